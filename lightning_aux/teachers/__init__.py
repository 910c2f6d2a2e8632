"""Teachers: second sets of weights and the rules that move them, other models, stored logits."""

from lightning_aux.teachers.ema import EMATeacher
from lightning_aux.teachers.frozen import FrozenTeacher
from lightning_aux.teachers.random import RandomTeacher
from lightning_aux.teachers.snapshot import SnapshotTeacher, VotedTeacher
from lightning_aux.teachers.stored import StoredTeacher
from lightning_aux.teachers.swa import SWATeacher
from lightning_aux.teachers.teacher import Teacher
from lightning_aux.teachers.teaching import teach

__all__ = [
    "EMATeacher",
    "FrozenTeacher",
    "RandomTeacher",
    "SWATeacher",
    "SnapshotTeacher",
    "StoredTeacher",
    "Teacher",
    "VotedTeacher",
    "teach",
]
