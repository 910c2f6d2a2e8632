"""What is compared: variants, seeds, and the metrics that are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

BASELINE = "baseline"


class ComparisonError(Exception):
    """The comparison cannot be made as asked; the message says why and what would work."""


@dataclass(frozen=True)
class Variant:
    """One thing that is compared: a whole fit config without seed, loggers and folders.

    Attributes:
        name: Its name in tables and folders.
        config: The config as written: base, overrides and added callbacks merged.
        resolved: The same with every default filled in by the parser.
        changes: What the compare file says about it, for the report.
    """

    name: str
    config: dict[str, Any]
    resolved: dict[str, Any]
    changes: dict[str, Any]

    def fingerprint(self, seed: int) -> str:
        """A digest of everything in the config that can change the outcome of the run."""
        # As it comes back from a file: keys are text then, which sorts otherwise than numbers.
        plain = json.loads(json.dumps([self.resolved, seed], default=str))
        text = json.dumps(plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Measure:
    """A logged metric and how it is read.

    Attributes:
        metric: Its name in the log.
        mode: Whether a larger (`max`) or a smaller (`min`) value is better.
        unit: `"%"` when the metric is a fraction that is shown as percent, else any text.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    unit: str = ""


@dataclass(frozen=True)
class Comparison:
    """A checked compare file.

    Attributes:
        title: Heading of the report.
        description: Text below the heading.
        decides: The metric that decides.
        also: Metrics that are compared beside it.
        curve: Name of the metric whose value per epoch is drawn; None for no curves.
        reference: Name of the variant that the others are compared with.
        seeds: One run of each variant per seed.
        overrides: What was set for all variants.
        variants: By name, the plain base first.
    """

    title: str
    description: str
    decides: Measure
    also: tuple[Measure, ...]
    curve: str | None
    reference: str
    seeds: tuple[int, ...]
    overrides: dict[str, Any]
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The metric that decides, then the others."""
        return (self.decides, *self.also)
