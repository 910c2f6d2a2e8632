"""Schedules: a scalar over training progress, and the units of time. No Lightning.

`Schedule.parse` reads what a user wrote, `Horizon` knows how long training is, and
`schedule.bind(horizon)` gives the function of the optimizer step.
"""

from .horizon import Duration, Horizon
from .interval import Interval, Time
from .parse import ScheduleError
from .schedule import (
    Chain,
    Constant,
    Cosine,
    Early,
    Exponential,
    Late,
    Linear,
    Schedule,
    Steps,
)

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "Duration",
    "Early",
    "Exponential",
    "Horizon",
    "Interval",
    "Late",
    "Linear",
    "Schedule",
    "ScheduleError",
    "Steps",
    "Time",
]
