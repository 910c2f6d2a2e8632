"""Teachers: second sets of weights for the user's module, and the rules that move them."""

from lightning_aux.teachers.ema import EMATeacher
from lightning_aux.teachers.frozen import FrozenTeacher
from lightning_aux.teachers.random import RandomTeacher
from lightning_aux.teachers.snapshot import SnapshotTeacher, VotedTeacher
from lightning_aux.teachers.swa import SWATeacher
from lightning_aux.teachers.teacher import Teacher

__all__ = [
    "EMATeacher",
    "FrozenTeacher",
    "RandomTeacher",
    "SWATeacher",
    "SnapshotTeacher",
    "Teacher",
    "VotedTeacher",
]
