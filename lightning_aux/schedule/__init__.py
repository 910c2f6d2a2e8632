"""Schedules: a scalar over training progress, and the units of time. No Lightning.

`Schedule.parse` reads what a user wrote, `Horizon` knows how long training is, and
`schedule.bind(horizon)` gives the function of the optimizer step.
"""

from .horizon import Border, Duration, Horizon, Moment, parse_moment
from .interval import Interval, Time
from .parse import ScheduleError
from .phases import Division
from .schedule import (
    Chain,
    Constant,
    Cosine,
    During,
    Early,
    Epochwise,
    Exponential,
    Late,
    Linear,
    Schedule,
    Steps,
    Sum,
)

__all__ = [
    "Border",
    "Chain",
    "Constant",
    "Cosine",
    "Division",
    "Duration",
    "During",
    "Early",
    "Epochwise",
    "Exponential",
    "Horizon",
    "Interval",
    "Late",
    "Linear",
    "Moment",
    "Schedule",
    "ScheduleError",
    "Steps",
    "Sum",
    "Time",
    "parse_moment",
]
