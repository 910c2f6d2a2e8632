"""The script that `test_two_ranks.py` runs: peer failures of several processes, under ``ddp``.

Lightning starts this file once more for the second process. Each process writes what it saw.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_aux as aux
from tests.engine.small_models import WIDTH, Blind, Classifier, rows

EPOCHS = 4  # of three steps for each process


class Normed(Classifier):
    """With BatchNorm, whose statistics differ between the ranks until ``ddp`` makes them equal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh())


class Collectives(TorchDispatchMode):
    """Counts what processes say to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def trainer(*callbacks: Any, **arguments: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": DDPStrategy(process_group_backend="gloo", find_unused_parameters=False),
        "max_epochs": EPOCHS,
        "callbacks": list(callbacks),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(quiet | arguments))


def normed() -> Normed:
    torch.manual_seed(3)
    return Normed()


def f22(folder: Path) -> dict[str, Any]:
    """The average after every step, and the collectives that its updates issued."""
    said: list[int] = []

    class Counted(aux.EMATeacher):
        def before_step(self, now: aux.Progress) -> None:
            with counted():
                super().before_step(now)

        def after_optimizer_step(self, now: aux.Progress) -> None:
            with counted():
                super().after_optimizer_step(now)

    @contextmanager
    def counted() -> Any:
        with Collectives() as mode:
            yield
        said.append(mode.count)

    held: list[dict[str, Tensor]] = []

    class Holding(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert teacher.store is not None
            names = [name for name, _ in module.named_parameters()]
            now = teacher.store.state_dict()
            held.append({name: now[name].clone() for name in names})

    teacher, module = Counted(decay=0.7), normed()
    data: list[Tensor] = []
    seeing = Blind(lambda step: data.append(step.batch[0].clone()))
    trainer(teacher, aux.SelfDistillation(), seeing, Holding()).fit(module, rows(shuffle=True))
    with Collectives() as mode:  # what is counted would be seen
        torch.distributed.all_reduce(torch.ones(1))
    return {"held": held, "said": said, "data": data, "premise": mode.count}


def f33(folder: Path) -> dict[str, Any]:
    """What a glob of two modules captured in the first step, and the size of its term."""
    seen: list[tuple[list[str], float]] = []

    class Calm(aux.Objective):
        def loss(self, step: aux.Step) -> Tensor:
            found = step.features("encoder.[02]")
            term = torch.stack([each.square().mean() for each in found.values()]).sum()
            seen.append((sorted(found), float(term.detach())))
            return term

    trainer(Calm(0.5, reads=("encoder.[02]",)), max_epochs=1).fit(normed(), rows())
    return {"seen": seen}


class Reconstruction(aux.Objective):
    """A head that predicts the input from the features."""

    def build_head(self, module: nn.Module) -> nn.Module:
        return nn.Linear(8, WIDTH)

    def loss(self, step: aux.Step) -> Tensor:
        return (self.head(step.features("encoder")) - step.batch[0].tanh()).square().mean()


def f38(folder: Path) -> dict[str, Any]:
    """A head after the whole training, and after one that was stopped and resumed."""

    class Saving(L.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(folder / "f38.ckpt")

    def run(*more: Any, **fit: Any) -> dict[str, Tensor]:
        # Ranks draw other heads, as without a seed: one of them has to be everybody's.
        torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
        objective, module = Reconstruction(0.5, reads=("encoder",)), Classifier()
        # Two steps of three epochs: the sampler's order depends on the epoch alone.
        trainer(objective, *more).fit(module, rows(shuffle=True), **fit)
        own = {f"head.{name}": value for name, value in objective.head.state_dict().items()}
        return {n: v.detach().clone() for n, v in (own | module.state_dict()).items()}

    return {"whole": run(Saving()), "resumed": run(ckpt_path=folder / "f38.ckpt")}


def f67(folder: Path) -> dict[str, Any]:
    """Who starts a run of Weights & Biases, and who writes to it."""
    import wandb

    calls: list[str] = []

    class Run:
        id, name, config, step = "fake", "fake", {}, 0

        def __getattr__(self, name: str) -> Any:
            def note(*args: Any, **kwargs: Any) -> None:
                calls.append(name)

            return note

    def init(*args: Any, **kwargs: Any) -> Run:
        calls.append("init")
        return Run()

    wandb.init, wandb.run = init, None
    callbacks = [aux.EMATeacher(), aux.SelfDistillation(), aux.DropoutSchedule(0.1, until="50%")]
    logger = WandbLogger(offline=True, save_dir=folder)
    made = trainer(*callbacks, logger=logger, log_every_n_steps=1)
    before = len(calls)
    made.fit(Classifier(), rows())
    return {"calls": calls, "before": before}


def f71(folder: Path) -> dict[str, Any]:
    """Running statistics with and without a teacher's pass in every step."""
    results: list[list[dict[str, Tensor]]] = []
    for teaches in (False, True):
        module = normed()
        seen: list[dict[str, Tensor]] = []

        class Noting(L.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                seen.append({n: b.clone() for n, b in module.named_buffers()})  # noqa: B023

        asking = Blind(lambda step: step.teacher("ema").logits)
        added = [aux.EMATeacher(decay=0.5, buffers="average"), asking] if teaches else []
        trainer(*added, Noting()).fit(module, rows(shuffle=True))
        results.append(seen)
    return {"without": results[0], "with": results[1]}


JOBS = {each.__name__: each for each in (f22, f33, f38, f67, f71)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ.get("LOCAL_RANK", "0")
    for name, job in JOBS.items():
        torch.save(job(folder), folder / f"{name}.{rank}.pt")
