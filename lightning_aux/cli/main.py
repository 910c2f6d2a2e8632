"""Entry point of `lightning-aux`: finds the subcommand and hands the arguments to it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from lightning_aux import AuxiliaryError

COMMANDS = {
    "fit": "train a LightningModule from a YAML config (LightningCLI)",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "evaluate a checkpoint on the test data",
    "predict": "run predict_step over the data",
    "teach": "write a teacher's logits for the training data to disk",
    "export": "write averaged weights as a plain checkpoint",
    "list": "show what can be attached, what it needs and what it costs",
    "inspect": "show what can be attached to a model, and what the callbacks of a config would do",
    "schedule": "show schedules as a chart and a picture, before they run",
    "report": "write a page about a run or a comparison, from the files in its folder",
    "compare": "train a baseline and variants over several seeds and report the differences",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        Exit status: 0 when everything asked for was done, 1 when a run of `compare` failed,
        or `inspect` found something that would fail,
        130 after Ctrl-C.

    Raises:
        SystemExit: With status 2 when the arguments or a config are wrong, or do not fit the model
            or its data.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        from lightning_aux import __version__

        print(f"lightning-aux {__version__}")
        return 0
    if command not in COMMANDS:
        _exit_with_error(_unknown(command))
    _make_working_directory_importable()
    try:
        if command == "compare":
            from lightning_aux.cli.compare import compare

            return compare(arguments[1:])
        if command == "export":
            from lightning_aux.cli.export import export

            return export(arguments[1:])
        if command == "teach":
            from lightning_aux.cli.teach import teach

            return teach(arguments[1:])
        if command == "list":
            from lightning_aux.cli.listing import listing

            return listing(arguments[1:])
        if command == "inspect":
            from lightning_aux.cli.inspect import inspect

            return inspect(arguments[1:])
        if command == "report":
            from lightning_aux.cli.report import report

            return report(arguments[1:])
        if command == "schedule":
            from lightning_aux.cli.schedule import schedule

            return schedule(arguments[1:])
        from lightning_aux.cli.trainer_cli import AuxCLI

        AuxCLI(args=arguments)
    except ModuleNotFoundError as error:
        hint = _missing_package_hint(command, error.name or "")
        if hint is None:
            raise
        _exit_with_error(hint)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        _exit_with_error(str(refusal))
    return 0


def _help() -> str:
    lines = [f"  {name:<10}{line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-aux COMMAND [--config FILE] ...",
            "",
            "Auxiliary training objectives for an unmodified LightningModule.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this text; after a command, that command's own options",
            "  --version   show the version",
        ]
    )


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown command '{command}'.{guess} Commands: {', '.join(COMMANDS)}."


def _refusal(error: BaseException | None) -> AuxiliaryError | None:
    """What of ours is behind an exception; its message is written for the user and is enough."""
    while error is not None and not isinstance(error, AuxiliaryError):
        error = error.__cause__
    return error


def _missing_package_hint(command: str, package: str) -> str | None:
    """What to install, when it is one of the command's own requirements that is missing."""
    root = package.partition(".")[0]
    if root in ("jsonargparse", "docstring_parser", "rich", "yaml"):
        return f"needs the package '{root}': pip install 'jsonargparse[signatures]' rich"
    if root in ("matplotlib", "scipy"):
        return f"{command} needs the package '{root}': pip install 'lightning-aux[recipes]'"
    if root == "submitit":
        install = "pip install 'lightning-aux[cluster]'"
        return f"{command} --cluster needs the package 'submitit': {install}"
    return None


def _make_working_directory_importable() -> None:
    """Let `class_path: my_package.MyModule` in a config name modules beside the user."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _exit_with_error(message: str) -> None:
    print(f"lightning-aux: error: {message}", file=sys.stderr)
    raise SystemExit(2)
