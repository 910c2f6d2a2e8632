"""How the values of a metric are written: percent with one decimal, or plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

MISSING = "–"


def size(count: float) -> str:
    """A number of bytes in MB or GB, of 10^6 and 10^9."""
    megabytes = count / 1e6
    return f"{megabytes / 1000:.2f} GB" if megabytes >= 1000 else f"{megabytes:.3g} MB"


@dataclass(frozen=True)
class Unit:
    """Writes values of one metric.

    Args:
        text: `"%"` shows fractions as percent and differences in percentage points; any other
            text is put behind plain numbers.
    """

    text: str = ""

    @property
    def factor(self) -> float:
        """From the raw value to the shown one."""
        return 100.0 if self.text == "%" else 1.0

    @property
    def of_difference(self) -> str:
        """The unit of a difference."""
        return "points" if self.text == "%" else self.text

    def label(self, metric: str) -> str:
        """The metric with its unit, for an axis or a column."""
        return f"{metric} ({self.text})" if self.text else metric

    def difference_label(self, metric: str) -> str:
        """The difference of the metric with its unit."""
        unit = f" ({self.of_difference})" if self.of_difference else ""
        return f"difference in {metric}{unit}"

    def number(self, value: float) -> str:
        """A value without its unit."""
        if math.isnan(value):
            return MISSING
        return f"{100 * value:.1f}" if self.text == "%" else f"{value:.4g}"

    def signed(self, value: float) -> str:
        """A difference without its unit, with its sign."""
        if math.isnan(value):
            return MISSING
        shown = f"{100 * value:+.1f}" if self.text == "%" else f"{value:+.3g}"
        return shown.replace("-", "−")
