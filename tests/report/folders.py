"""Folders as runs and comparisons leave them, with numbers that are known."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning_aux.comparison import (
    Comparison,
    Measure,
    RunResult,
    Variant,
    run_directory,
    write_comparison,
    write_result,
)

EPOCHS, STEPS = 6, 4
VARIANTS = ("baseline", "distilled")


def accuracy(variant: str, seed: int, epoch: int) -> float:
    return 0.5 + 0.05 * epoch + 0.01 * seed + 0.1 * VARIANTS.index(variant)


def metrics_csv(variant: str, seed: int = 0) -> str:
    """What CSVLogger writes: a row for each step that is logged, one for each epoch's end."""
    rows: list[dict[str, Any]] = []
    for epoch in range(EPOCHS):
        step = epoch * STEPS
        row = {"step": step, "epoch": epoch, "aux/main": 2.0 - 0.1 * epoch}
        if variant == "distilled":
            term = 0.5 + seed + 0.1 * epoch
            row |= {
                "aux/self_distillation": term,
                "aux/self_distillation/weight": 0.2 * epoch,
                "aux/total": row["aux/main"] + 0.2 * epoch * term,
                "aux/gradients/main_norm": 3.0,
                "aux/gradients/self_distillation_norm": 1.5,
                "aux/gradients/self_distillation_ratio": 0.5,
                "aux/gradients/self_distillation_cosine": -0.25,
                "aux/ema/distance": 0.01 * epoch,
                "aux/dropout_schedule/p": 0.1,
            }
        rows.append(row)
        rows.append(
            {"step": step + STEPS - 1, "epoch": epoch, "val_acc": accuracy(variant, seed, epoch)}
        )
    names = ["step", "epoch", *dict.fromkeys(key for row in rows for key in row)]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(names)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def run_folder(folder: Path, variant: str = "distilled", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(metrics_csv(variant, seed))
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    return folder


def comparison_folder(folder: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    variants = {
        name: Variant(name, {"trainer": {"max_epochs": EPOCHS}}, {}, {"callbacks": []})
        for name in VARIANTS
    }
    comparison = Comparison(
        title="Known <numbers>",
        description="Made for a test.",
        decides=Measure("test_acc", "max", "%"),
        also=(Measure("test_nll", "min"),),
        curve="val_acc",
        reference="baseline",
        seeds=seeds,
        overrides={},
        variants=variants,
    )
    write_comparison(folder, comparison)
    for name in VARIANTS:
        for seed in seeds:
            where = run_folder(run_directory(folder, name, seed), name, seed)
            last = accuracy(name, seed, EPOCHS - 1)
            noise = 0.001 * seed if name == "distilled" else 0.0
            fingerprint = variants[name].fingerprint(seed)
            result = RunResult(
                name, seed, fingerprint, {"test_acc": last + noise, "test_nll": 1 - last}
            )
            result.history = [
                {"epoch": float(epoch), "val_acc": accuracy(name, seed, epoch)}
                for epoch in range(EPOCHS)
            ]
            result.step_seconds = 0.002 if name == "baseline" else 0.003
            result.peak_bytes = 1_000_000 if name == "baseline" else 1_500_000
            result.seconds = 1.0
            write_result(where, result)
    return folder
