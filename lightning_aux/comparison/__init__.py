"""A comparison of variants over seeds, as plain values: what its runs left, and what they show.

Nothing here trains or prints: `lightning_aux.cli` does the one, `lightning_aux.report` the other.
"""

from lightning_aux.comparison.comparison import (
    BASELINE,
    Comparison,
    ComparisonError,
    Measure,
    Variant,
)
from lightning_aux.comparison.results import (
    COMPARISON_FILE,
    ERROR_FILE,
    JOB_FILE,
    LOG_FILE,
    RESULT_FILE,
    RunResult,
    finished_result,
    read_comparison_of,
    read_result,
    run_directory,
    write_comparison,
    write_result,
)
from lightning_aux.comparison.statistics import (
    SIGNIFICANT,
    PairedDifference,
    Verdict,
    paired_difference,
)
from lightning_aux.comparison.summary import VariantSummary, summarise, write_tables

__all__ = [
    "BASELINE",
    "COMPARISON_FILE",
    "ERROR_FILE",
    "JOB_FILE",
    "LOG_FILE",
    "RESULT_FILE",
    "SIGNIFICANT",
    "Comparison",
    "ComparisonError",
    "Measure",
    "PairedDifference",
    "RunResult",
    "Variant",
    "VariantSummary",
    "Verdict",
    "finished_result",
    "paired_difference",
    "read_comparison_of",
    "read_result",
    "run_directory",
    "summarise",
    "write_comparison",
    "write_result",
    "write_tables",
]
