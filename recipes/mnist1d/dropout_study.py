"""Does early dropout help a model that underfits, and late dropout one that overfits?

    python -m recipes.mnist1d.dropout_study

"Dropout Reduces Underfitting" (arXiv:2303.01500) claims a lower final training loss for early
dropout where the model is too small for its data, and a better generalisation for late dropout
where it is too large. Here: no, standard, early and late dropout on MNIST-1D, for three networks
that underfit 4,000 samples and one that overfits 500. Final training loss (in evaluation, over all
training samples), test accuracy, and what the gradients do meanwhile; five seeds. Writes a table
and a picture below runs/mnist1d/dropout_study.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from matplotlib import pyplot
from torch import Tensor
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.comparison.statistics import paired_difference
from recipes.mnist1d import ConvClassifier, MNIST1DData

SEEDS = (3, 4, 5, 6, 7)
# Fixed before anything was run. Dropout ends, or begins, after a fifth of training.
CUT = "20%"
SETTINGS: dict[str, dict[str, Any]] = {
    "underfits, width 4": {"width": 4, "samples": 4000, "epochs": 40, "p": 0.1},
    "underfits, width 8": {"width": 8, "samples": 4000, "epochs": 40, "p": 0.1},
    "underfits, width 16": {"width": 16, "samples": 4000, "epochs": 40, "p": 0.1},
    "overfits, width 64": {"width": 64, "samples": 500, "epochs": 160, "p": 0.3},
}
KINDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "standard": {"mode": "standard"},
    "early": {"mode": "early", "until": CUT, "shape": "linear"},
    "late": {"mode": "late", "start": CUT},
}


@torch.no_grad()
def evaluated(module: ConvClassifier, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
    """Mean loss and accuracy over a whole set."""
    module.eval()
    x, y = tensors
    logits = torch.cat([module(part) for part in x.split(1000)])
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def one_run(setting: dict[str, Any], kind: str, seed: int) -> dict[str, Any]:
    """Train once; everything but the dropout is the same for all kinds of one seed."""
    L.seed_everything(seed, verbose=False)
    data = MNIST1DData(data_seed=7, train_size=4000)
    data.prepare_data()
    data.setup("fit")
    train = torch.utils.data.TensorDataset(
        *(each[: setting["samples"]] for each in data.datasets["train"].tensors)
    )
    module = ConvClassifier(width=setting["width"])
    directions = aux.GradientDirection(every="5%", batches=16, full=32)
    callbacks: list[L.Callback] = [directions]
    if (arguments := KINDS[kind]) is not None:
        callbacks.append(aux.DropoutSchedule(setting["p"], **arguments))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=setting["epochs"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
    )
    trainer.fit(module, torch.utils.data.DataLoader(train, batch_size=100, shuffle=True))
    loss, accuracy = evaluated(module, train.tensors)
    test_loss, test_accuracy = evaluated(module, data.datasets["test"].tensors)
    total = trainer.global_step
    return {
        "train_loss": loss,
        "train_acc": 100 * accuracy,
        "test_loss": test_loss,
        "test_acc": 100 * test_accuracy,
        "directions": [[at / total, found] for at, found in directions.measured],
    }


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Mean ± standard deviation, and the paired difference to no dropout with its 95 % interval."""
    lines = [
        "| network | dropout | final training loss | difference | test accuracy, % | difference |",
        "|---|---|---|---|---|---|",
    ]
    for setting, kinds in results.items():
        for kind, runs in kinds.items():
            cells = [setting, kind]
            for key, digits in (("train_loss", 3), ("test_acc", 1)):
                values = torch.tensor([each[key] for each in runs])
                cells.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
                if kind == "none":
                    cells.append("–")
                    continue
                found = paired_difference(
                    [each[key] for each in runs], [each[key] for each in kinds["none"]]
                )
                cells.append(
                    f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Directional variance and error of the gradients over training, mean over seeds."""
    mpl.use("Agg")
    figure, axes = pyplot.subplots(2, len(results), figsize=(3.2 * len(results), 5.2), sharex=True)
    for column, (setting, kinds) in enumerate(results.items()):
        for row, key in enumerate(("variance", "error")):
            axis = axes[row][column]
            for kind, runs in kinds.items():
                at = [100 * share for share, _ in runs[0]["directions"]]
                values = torch.tensor([[f[key] for _, f in each["directions"]] for each in runs])
                (line,) = axis.plot(at, values.mean(0), label=kind)
                low, high = values.min(0).values, values.max(0).values
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set_title(setting if row == 0 else "")
            if column == 0:
                axis.set_ylabel(f"gradient direction {key}")
            if row == 1:
                axis.set_xlabel("% of training")
            axis.axvline(20, color="0.6", linewidth=0.8)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--epochs", type=int, help="instead of those of the settings")
    given = parser.parse_args()
    folder = Path("runs/mnist1d/dropout_study")
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, setting in SETTINGS.items():
        own = setting | ({"epochs": given.epochs} if given.epochs else {})
        results[name] = {kind: [one_run(own, kind, seed) for seed in given.seeds] for kind in KINDS}
        print(table({name: results[name]}), flush=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "table.md").write_text(table(results) + "\n")
    picture(results, folder / "directions.png")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
