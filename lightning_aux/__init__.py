"""Auxiliary training objectives that attach to any LightningModule from outside.

Callbacks for a Trainer, entries of a LightningCLI recipe, or mixins: one implementation.
"""

# Before anything here imports Lightning, which these two do not.
from lightning_aux import functional, malicious_releases  # noqa: F401
from lightning_aux.engine import AuxiliaryError, Pass, Progress, Step
from lightning_aux.inspection import inspect
from lightning_aux.mixin import AuxiliaryMixin
from lightning_aux.registry import *  # noqa: F403 - the registry is the list of public classes
from lightning_aux.registry import __all__ as _registered
from lightning_aux.schedule import Horizon, Schedule

__version__ = "0.1.0"

__all__ = [
    "AuxiliaryError",
    "AuxiliaryMixin",
    "Horizon",
    "Pass",
    "Progress",
    "Schedule",
    "Step",
    "functional",
    "inspect",
]
__all__ += _registered
