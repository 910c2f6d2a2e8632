"""How often the 95 % intervals of a comparison cover the true mean difference, by simulation.

    python -m tests.comparison.coverage

The differences are normal, or skewed: exponential, whose skewness is 2.
"""

import sys

import numpy as np

from lightning_aux.comparison import paired_difference

# Both have mean 1.
DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(1.0, 1.0, size=n),
    "skewed": lambda rng, n: rng.exponential(1.0, size=n),
}


def coverage(distribution: str, n: int, repetitions: int) -> tuple[float, float]:
    """Share of repetitions in which the t interval, and the bootstrap interval, cover the mean."""
    rng = np.random.default_rng(n)
    covered = np.zeros(2)
    for _ in range(repetitions):
        differences = DISTRIBUTIONS[distribution](rng, n).tolist()
        found = paired_difference(differences, [0.0] * n)
        covered += found.low <= 1 <= found.high, found.boot_low <= 1 <= found.boot_high
    student, bootstrap = covered / repetitions
    return float(student), float(bootstrap)


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print("| differences | seeds | Student's t | bootstrap |\n|---|---:|---:|---:|")
    for distribution in DISTRIBUTIONS:
        for n in (3, 5, 10):
            student, bootstrap = coverage(distribution, n, repetitions)
            print(f"| {distribution} | {n} | {student:.1%} | {bootstrap:.1%} |".replace("%", " %"))


if __name__ == "__main__":
    main()
