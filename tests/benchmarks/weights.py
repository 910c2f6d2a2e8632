"""How fast averaged weights are updated and exchanged, beside other implementations, in one run.

``make bench-weights`` prints the table and writes it, with a picture, to docs/benchmarks.md. All
implementations take turns on the same modules; what is given is the median turn over the time of
the floor: one ``lerp_`` of as many numbers in one flat tensor, which is the speed of memory.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_aux.weights import WeightStore

ROOT = Path(__file__).parents[2]
TURNS = 15
DECAY = 0.999


def bottleneck(inputs: int, width: int, first: bool) -> nn.Module:
    layers = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)]
    layers += [nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width)]
    layers += [nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)]
    if first:
        layers += [nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)]
    return nn.Sequential(*layers)


def resnet50() -> nn.Module:
    """The parameters and buffers of a ResNet-50: 25.6 million in 161 tensors."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for place in range(depth):
            blocks.append(bottleneck(inputs, width, place == 0))
            inputs = 4 * width
    return nn.Sequential(*blocks, nn.Linear(2048, 1000))


def vit_b() -> nn.Module:
    """Those of a ViT-B/16: 86 million in 150 tensors."""
    blocks = [nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True) for _ in range(12)]
    return nn.Sequential(nn.Conv2d(3, 768, 16), *blocks, nn.LayerNorm(768), nn.Linear(768, 1000))


def small_tensors() -> nn.Module:
    """A thousand tensors of 32 by 32."""
    return nn.ParameterList([nn.Parameter(torch.randn(32, 32)) for _ in range(1000)])


MODULES = {"ResNet-50": resnet50, "ViT-B": vit_b, "1,000 small tensors": small_tensors}


def floor(module: nn.Module) -> Callable[[], object]:
    count = sum(each.numel() for each in module.parameters())
    average, live = torch.randn(count), torch.randn(count)
    return lambda: average.lerp_(live, 1 - DECAY)


class Lightning:
    """What the callbacks of Lightning do, without a Trainer around them."""

    def __init__(self, module: nn.Module) -> None:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        self.module = module
        self.callback = EMAWeightAveraging(decay=DECAY)
        self.average = self.callback._average_model = AveragedModel(
            module, use_buffers=True, **self.callback._kwargs
        )

    def update(self) -> None:
        self.average.update_parameters(self.module)

    def exchange(self) -> None:
        self.callback._swap_models(self.module)
        self.callback._swap_models(self.module)


def updates(module: nn.Module) -> dict[str, Callable[[], object]]:
    """One update of each implementation."""
    store = WeightStore(module)

    def ours() -> None:
        store.update(DECAY)
        store.update_buffers(DECAY)

    found: dict[str, Callable[[], object]] = {"flat lerp_": floor(module), "lightning_aux": ours}
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    found["torch AveragedModel"] = lambda: averaged.update_parameters(module)
    found["Lightning"] = Lightning(module).update
    try:
        from ema_pytorch import EMA

        ema = EMA(
            module, beta=DECAY, update_after_step=0, update_every=1, include_online_model=False
        )
        ema.update()
        found["ema-pytorch"] = lambda: ema.update_moving_average(ema.ema_model, module)
    except ModuleNotFoundError:
        print("ema-pytorch is not installed: pip install 'lightning-aux[peers]'")
    try:
        from torch_ema import ExponentialMovingAverage

        moving = ExponentialMovingAverage(module.parameters(), decay=DECAY)
        found["torch-ema"] = moving.update
    except ModuleNotFoundError:
        print("torch-ema is not installed: pip install 'lightning-aux[peers]'")
    return found


def exchanges(module: nn.Module) -> dict[str, Callable[[], object]]:
    """The average into the module and out again."""
    store = WeightStore(module)

    def ours() -> None:
        with store.in_place():
            pass

    found: dict[str, Callable[[], object]] = {"lightning_aux": ours}
    found["Lightning"] = Lightning(module).exchange
    try:
        from torch_ema import ExponentialMovingAverage

        moving = ExponentialMovingAverage(module.parameters(), decay=DECAY)

        def theirs() -> None:
            with moving.average_parameters():
                pass

        found["torch-ema"] = theirs
    except ModuleNotFoundError:
        pass
    return found


@torch.no_grad()
def measured(acts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the median turn; all take turns, each turn long enough for the clock."""
    repeats = {}
    for name, act in acts.items():
        act()
        began = time.perf_counter()
        act()
        repeats[name] = max(1, round(0.02 / max(1e-6, time.perf_counter() - began)))
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(TURNS):
        names = list(acts) if turn % 2 else list(reversed(acts))
        for name in names:
            began = time.perf_counter()
            for _ in range(repeats[name]):
                acts[name]()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return {name: median(each) for name, each in seconds.items()}


def memory(module: nn.Module) -> float:
    """Bytes that a store holds over those of the parameters and buffers."""
    store = WeightStore(module)
    held = sum(each.nbytes for each in store.state_dict().values())
    own = [*module.parameters(), *module.buffers()]
    return held / sum(each.nbytes for each in own)


def picture(update: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(update))
    for one, (name, times) in zip(axes, update.items(), strict=True):
        base = times["flat lerp_"]
        one.set_xlim(0.5, 400)
        others = {who: value / base for who, value in times.items() if who != "flat lerp_"}
        ordered = sorted(others, key=others.__getitem__, reverse=True)
        colours = ["#c8553d" if who == "lightning_aux" else "#9aa5b1" for who in ordered]
        one.barh(ordered, [others[who] for who in ordered], color=colours)
        one.set_xscale("log")
        one.set_title(name, fontsize=10)
        one.axvline(1, color="#333333", linewidth=0.8)
        one.spines[["top", "right"]].set_visible(False)
        for place, who in enumerate(ordered):
            one.text(others[who], place, f" {others[who]:.3g}", va="center", fontsize=8)
        one.tick_params(labelsize=8)
    figure.supxlabel("time of an update, in times of one flat lerp_ of as many numbers", fontsize=9)
    figure.savefig(path, dpi=150)


def table(times: dict[str, dict[str, float]], base: str) -> list[str]:
    names = list(dict.fromkeys(who for each in times.values() for who in each))
    lines = ["| | " + " | ".join(times) + " |", "|---|" + "---:|" * len(times)]
    for who in names:
        cells = []
        for each in times.values():
            if who not in each:
                cells.append("")
            elif who == base:
                cells.append(f"{each[who] * 1e3:.3g} ms")
            else:
                cells.append(f"{each[who] / each[base]:.3g}")
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    update, exchange, held = {}, {}, {}
    for name, make in MODULES.items():
        module = make()
        update[name] = measured(updates(module))
        exchange[name] = measured(exchanges(module))
        held[name] = memory(module)
    load = os.getloadavg()[0]
    lines = [
        "# Speed of averaged weights",
        "",
        "Written by `make bench-weights`: all implementations in one process with one thread, in",
        f"turns; the median of {TURNS} turns. The machine's load at the end was {load:.1f}; torch "
        f"{torch.__version__}, {platform.machine()}.",
        "",
        "## An update",
        "",
        "Times of one `lerp_` of as many numbers in a flat tensor, which is given in milliseconds.",
        "",
        *table(update, "flat lerp_"),
        "",
        "![Time of an update over that of a flat lerp_, by implementation](images/updates.png)",
        "",
        "## Into the module and out again",
        "",
        "Times of ours, which is given in milliseconds.",
        "",
        *table(exchange, "lightning_aux"),
        "",
        "## Memory",
        "",
        "What a store holds over what the module holds, in bytes: "
        + ", ".join(f"{name} {value:.3f}" for name, value in held.items())
        + ".",
        "",
    ]
    print("\n".join(lines))
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines))
    picture(update, ROOT / "docs" / "images" / "updates.png")


if __name__ == "__main__":
    main()
