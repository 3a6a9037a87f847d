"""The `t2` command, one file per subcommand."""

from t2.cli.app import main

__all__ = ["main"]
