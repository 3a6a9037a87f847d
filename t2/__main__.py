"""`python -m t2`: the `t2` command."""

from t2.cli import main

main()
