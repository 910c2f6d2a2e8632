"""Soups and WiSE-FT when the test set is not like the data of the fine-tuning.

    python -m recipes.mnist1d.shifted_test

A network is trained on MNIST-1D, then fine-tuned on few signals of another kind: moved along by
eight samples and half as strong. How good is it on the new kind, and how much of the old one has it
forgotten? Compared are the fine-tuned network, weights between before and after (WiSE-FT), and the
mean of four fine-tuned networks (a soup). Everything that is chosen is chosen on validation data of
the new kind; five seeds. Writes a table and a picture below runs/mnist1d/shifted_test.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux
from lightning_aux.weights import greedy_soup, interpolate, uniform_soup
from recipes.mnist1d import ConvClassifier, MNIST1DData

SEEDS = (3, 4, 5, 6, 7)
COEFFICIENTS = tuple(place / 10 for place in range(11))
FEW = 400
RATES = (0.0005, 0.001, 0.002, 0.004)  # of the four members of a soup


def moved(x: Tensor) -> Tensor:
    """The new kind of signals."""
    return 0.5 * x.roll(8, dims=-1)


def loaders(seed: int) -> dict[str, DataLoader]:
    """Training and test data of both kinds, validation data of the new one."""
    data = MNIST1DData(data_seed=7)
    data.prepare_data()
    data.setup("fit")
    x, y = data.datasets["train"].tensors
    few = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:FEW]
    val_x, val_y = data.datasets["val"].tensors
    test_x, test_y = data.datasets["test"].tensors
    sets = {
        "old": (x, y),
        "new": (moved(x[few]), y[few]),
        "new_val": (moved(val_x), val_y),
        "old_test": (test_x, test_y),
        "new_test": (moved(test_x), test_y),
    }
    return {
        name: DataLoader(TensorDataset(*each), batch_size=100, shuffle=name in ("old", "new"))
        for name, each in sets.items()
    }


def train(module: ConvClassifier, data: DataLoader, val: DataLoader, epochs: int, *more) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in more),
        callbacks=list(more),
    )
    trainer.fit(module, data, val)


@torch.no_grad()
def accuracy(weights: dict[str, Tensor], data: DataLoader) -> float:
    module = ConvClassifier()
    module.load_state_dict(weights)
    module.eval()
    right = [(module(x).argmax(1) == y).float().sum() for x, y in data]
    return float(sum(right)) / len(data.dataset)


def loaded(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def one_seed(seed: int, folder: Path) -> tuple[dict[str, tuple[float, float]], list]:
    """Accuracy on the new and the old kind, of every way; and both along the line between."""
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    data = loaders(seed)
    before = ConvClassifier()
    train(before, data["old"], data["new_val"], 30)
    torch.save({"state_dict": before.state_dict()}, folder / "before.ckpt")

    paths = []
    for number, rate in enumerate(RATES):
        L.seed_everything(seed + 100 * number, verbose=False)
        module = ConvClassifier(lr=rate)
        module.load_state_dict(before.state_dict())
        mix = aux.WiSEFT("val_acc", filename=f"between_{number}.ckpt")
        saving = ModelCheckpoint(folder, filename=f"tuned_{number}", enable_version_counter=False)
        train(module, data["new"], data["new_val"], 30, mix, saving)
        paths.append(folder / f"tuned_{number}.ckpt")

    def on_validation(weights: dict[str, Tensor]) -> float:
        return accuracy(weights, data["new_val"])

    def both(weights: dict[str, Tensor]) -> tuple[float, float]:
        return accuracy(weights, data["new_test"]), accuracy(weights, data["old_test"])

    best = max(range(len(paths)), key=lambda number: on_validation(loaded(paths[number])))
    uniform_soup(paths, folder / "uniform.ckpt")
    greedy_soup(paths, on_validation, folder / "greedy.ckpt")
    results = {
        "before fine-tuning": both(loaded(folder / "before.ckpt")),
        "fine-tuned, the best of four": both(loaded(paths[best])),
        "WiSE-FT of that one": both(loaded(folder / f"between_{best}.ckpt")),
        "uniform soup of the four": both(loaded(folder / "uniform.ckpt")),
        "greedy soup": both(loaded(folder / "greedy.ckpt")),
    }
    line = []
    for coefficient in COEFFICIENTS:
        interpolate(folder / "before.ckpt", paths[best], coefficient, folder / "point.ckpt")
        line.append(both(loaded(folder / "point.ckpt")))
    return results, line


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval, by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean(values), float(half)


def table(runs: list[dict[str, tuple[float, float]]]) -> str:
    lines = ["| | new kind, % | old kind, % |", "|---|---:|---:|"]
    for way in runs[0]:
        cells = []
        for kind in (0, 1):
            middle, half = interval([100 * run[way][kind] for run in runs])
            cells.append(f"{middle:.1f} ± {half:.1f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(lines: list[list[tuple[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for kind, (label, colour) in enumerate((("new kind", "#c8553d"), ("old kind", "#3b6ea8"))):
        points = [interval([100 * line[i][kind] for line in lines]) for i in range(len(lines[0]))]
        axes.plot(COEFFICIENTS, [m for m, _ in points], marker="o", color=colour, label=label)
        low = [m - h for m, h in points]
        high = [m + h for m, h in points]
        axes.fill_between(COEFFICIENTS, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("α: 0 before fine-tuning, 1 after it")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist1d/shifted_test"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    found = [one_seed(seed, given.out / f"seed{seed}") for seed in given.seeds]
    text = table([results for results, _ in found])
    (given.out / "table.md").write_text(text)
    picture([line for _, line in found], given.out / "between.png")
    print(text)


if __name__ == "__main__":
    main()
