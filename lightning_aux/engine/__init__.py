"""The engine: everything that knows how Lightning runs a training step.

Objectives, teachers and schedules are members of an engine and know only tensors.
"""

from lightning_aux.engine.another import AnotherModel
from lightning_aux.engine.attached import Attached
from lightning_aux.engine.engine import Engine, TeacherLike
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.step import Pass, Progress, Record, Step, Vote, VotedPass
from lightning_aux.engine.taps import Locations, Tap

__all__ = [
    "AnotherModel",
    "Attached",
    "AuxiliaryError",
    "Engine",
    "Locations",
    "Pass",
    "Progress",
    "Record",
    "Step",
    "Tap",
    "TeacherLike",
    "Vote",
    "VotedPass",
]
