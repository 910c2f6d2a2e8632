"""LightningCLI as `lightning-aux` uses it: our callbacks by short name and the flag `--wandb`."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_aux import AuxiliaryError, Objective
from lightning_aux.cli.yaml_keys import PARSER_MODE
from lightning_aux.schedule import ScheduleError

WANDB_LOGGER = "lightning.pytorch.loggers.WandbLogger"
WandbMode = Literal["online", "offline", "off"]


class AuxCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` with every class of `lightning_aux` known by name.

    The resolved config is saved beside the logs.

    Args:
        args: Command line arguments, or a whole config as a dictionary.
        run: Whether the first argument is a subcommand that is run at once. With False the
            config is that of no subcommand, and the objects are made but not used.
        exit_on_error: Whether a wrong config ends the process with status 2; otherwise it raises.

    Raises:
        SystemExit: When the config is wrong and `exit_on_error` is True.
        jsonargparse.ArgumentError: When the config is wrong and `exit_on_error` is False.
    """

    def __init__(self, args: ArgsType, run: bool = True, exit_on_error: bool = True) -> None:
        super().__init__(
            args=args,
            run=run,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "lightning-aux",
                "exit_on_error": exit_on_error,
                "parser_mode": PARSER_MODE,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--wandb`."""
        parser.add_argument(
            "--wandb",
            type=WandbMode | None,
            default=None,
            help="Send what WandbLogger writes to the server, keep it on disk, or leave the logger "
            "out. By default the config decides.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, check what types do not tell, and let `--wandb` have its say about the loggers."""
        # LightningCLI's own version warns whenever arguments are passed, as `main` always does
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)
        subcommand = self.config.get("subcommand")
        chosen = self.config[subcommand] if subcommand else self.config
        _refuse_objectives_without_a_term(parser, chosen.trainer.callbacks)
        if chosen.wandb is not None:
            loggers = loggers_for(chosen.wandb, chosen.trainer.logger)
            override: dict[str, Any] = {"trainer": {"logger": loggers}}
            self.config = parser.parse_object(
                {subcommand: override} if subcommand else override, self.config
            )

    def instantiate_classes(self) -> None:
        """Make the objects; arguments that a class of ours refuses are a wrong config."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = root_cause(error)
            if isinstance(cause, AuxiliaryError | ScheduleError):
                self.parser.error(str(cause), cause)
            raise cause from None


def root_cause(error: BaseException) -> BaseException:
    """What a class raised when it was made, out of what the parser wrapped around it."""
    while error.__cause__ is not None and not isinstance(error, AuxiliaryError):
        error = error.__cause__
    return error


def loggers_for(mode: WandbMode, loggers: Any) -> Any:
    """The loggers of a parsed config with Weights & Biases online, offline or left out.

    Args:
        mode: What the user asked for.
        loggers: `trainer.logger` of the config: None, a bool, one logger or a list of them.

    Returns:
        The new value of `trainer.logger`. A WandbLogger is added when one is asked for and the
        config has none.
    """
    if loggers is True or loggers is None:
        # what Lightning would make by itself, said out loud so that another can stand beside it
        loggers = [
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}
        ]
    elif loggers is False:
        loggers = []
    elif not isinstance(loggers, list):
        loggers = [loggers]
    plain = [entry.as_dict() if isinstance(entry, Namespace) else dict(entry) for entry in loggers]
    others = [entry for entry in plain if not _is_wandb(entry)]
    if mode == "off":
        return others or False
    ours = [entry for entry in plain if _is_wandb(entry)] or [
        {"class_path": WANDB_LOGGER, "init_args": {"project": "lightning-aux", "save_dir": "runs"}}
    ]
    for entry in ours:
        entry["init_args"] = {**entry.get("init_args", {}), "offline": mode == "offline"}
    return others + ours


def _refuse_objectives_without_a_term(parser: LightningArgumentParser, callbacks: Any) -> None:
    entries = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    for entry in entries:
        if getattr(resolve_name(entry.class_path), "loss", None) is Objective.loss:
            parser.error(
                f"trainer.callbacks: {entry.class_path} has no term: a class of yours that defines "
                f"loss(self, step) has one, and so have EMAAnchor, SelfDistillation and the others."
            )


def _is_wandb(logger: dict[str, Any]) -> bool:
    return str(logger.get("class_path")).rpartition(".")[2] == "WandbLogger"
