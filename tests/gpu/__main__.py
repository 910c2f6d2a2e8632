"""`python -m tests.gpu`: every check on the GPU, a line each; without a GPU one line that says so.

Needs torch and lightning alone. `--device cpu` runs what exists on a CPU, and tests the checks.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="a part of the names of the checks to run")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # cuBLAS sums in one order, so that two trainings of one kind are the same.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here (--device cpu runs the checks on the CPU)")
        print("0 passed, 0 failed, 0 skipped")
        return 0
    import lightning

    from tests.gpu.checks import run

    where = torch.cuda.get_device_name() if given.device == "cuda" else "the CPU"
    python = sys.version.split()[0]
    print(f"Python {python}, torch {torch.__version__}, lightning {lightning.__version__}: {where}")
    passed, failed, skipped = run(given.only, given.device)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed + skipped else 0


if __name__ == "__main__":
    sys.exit(main())
