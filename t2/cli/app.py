"""Entry point of the `t2` command: imports the asked subcommand's module, and no other, and runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from t2.cli.options_file import with_options_file

if TYPE_CHECKING:
    from tyro.extras import SubcommandApp

COMMANDS = {
    "demo": "Serve 32 requests with 32 experts in one batch, check it, and time it beside the baselines.",
    "decompose": "Decompose the target matrices of a model into the factor cache.",
    "estimate": "Estimate disk, memory, time and GPUs that a model needs, from its config alone.",
    "generate": "Answer prompts in one batch, each with its own expert.",
    "chat": "Talk to a model and its experts in the terminal.",
    "serve": "Answer over HTTP as OpenAI's API does, each request with its own expert.",
    "train": "Train an expert for a task with reinforcement learning.",
    "transfer": "Convert an expert of one model into an expert of another.",
    "export": "Write an expert as a merged model, a LoRA adapter, or an adapter for PEFT or vLLM.",
    "bank": "Make and change banks of experts; train their classification expert.",
    "bench": "Measure this machine, one layer and one model beside the dense ones.",
    "adapt": "Search for the mix of experts that does best on a few examples of a task.",
    "eval": "Score experts beside the base on a task, or evaluate a bank as the paper does.",
}
"""The line of each command in `t2 --help`. Its code is `run` in the module of that name in this folder."""
RENAMED = {
    "--dtype": "--factor-dtype",
    "--experts": "--candidates",
    "--plan": "--spec of `t2 eval`, or `t2 estimate MODEL` in place of `t2 decompose --plan`",
    "--skip-even-prompts": "--skip-zero-advantage",
    "--sample": "--temperature 1",
    "--no-skip-even-prompts": "--no-skip-zero-advantage",
}
"""Option names of version 0.1."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the `t2` command; an error in the input ends it with one line and exit code 2."""
    arguments = [str(argument) for argument in (sys.argv[1:] if args is None else args)]
    if arguments[:1] == ["--version"]:
        print(f"t2 {metadata.version('t2kernels')}")
        sys.exit(0)
    try:
        for option in (argument.partition("=")[0].replace("_", "-") for argument in arguments[1:]):
            if option in RENAMED:
                raise ValueError(f"{option}: expected the new name {RENAMED[option]}, got the old one")
        arguments = with_options_file(arguments)
        description = "Transformer-squared on fused SVF kernels. `t2 --version` prints the version."
        code = _app(arguments[:1]).cli(prog="t2", description=description, args=arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"t2: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


def _app(asked: Sequence[str]) -> SubcommandApp:
    """All commands: the asked one, or every one for shell completion, as itself; the others by their line of help."""
    from tyro.extras import SubcommandApp

    app = SubcommandApp()
    for name, line in COMMANDS.items():
        if name in asked or any("completion" in argument for argument in asked):
            app.command(name=name)(import_module(f"t2.cli.{name}").run)
        else:
            app.command(name=name, help=line)(_not_asked)
    return app


def _not_asked() -> None:
    """Stand-in for a command that does not run."""
