"""What is trained in every place: each job is one or two fits and returns plain values.

The tests run some of the same functions in one process, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_aux import EMATeacher, Objective, SelfDistillation, Step, Taps
from lightning_aux.engine.distributed import Route
from lightning_aux.registry import ENTRIES
from lightning_aux.schedule import Steps
from tests.contract.models import FEATURES, HIDDEN, Classifier, Samples
from tests.contract.probe import Probe
from tests.contract.strategies.places import BATCH, STEPS, WINDOW, Place, train, whole_weights
from tests.contract.strategies.watching import (
    Collectives,
    Rows,
    Watch,
    heads,
    holds_weights,
    optimizer_parts,
    parts_of,
    said,
    trace,
    with_companions,
)
from tests.contract.test_c01_do_no_harm import Watching
from tests.contract.training import (
    TERMS,
    callbacks,
    identical,
    quiet_trainer,
    random_state,
    shared,
    together,
)

HEAD, WITHOUT = "head", "without"
CASES = [*ENTRIES, HEAD]
TRAINED = [case for case in CASES if shared(case) == case]  # for themselves, or for others too
# What trains where parameters are whole only, and says so elsewhere.
REFUSED = [name for name, entry in ENTRIES.items() if not entry.sharded]
WEIGHT = "linear(0.2, 1, until=100%)"
# Arguments of the model and of the Trainer.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({}, {}),
    "adam": ({"optimizer": "adam"}, {}),
    "accumulated": ({}, {"accumulate_grad_batches": WINDOW}),
    "manual": ({"manual": True}, {}),
    "BatchNorm": ({"norm": True}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
}
STATES = ("sgd", "accumulated", "BatchNorm")  # the variants in which states are noted
FORMS = {"file": False, "folder": True}
SAVED_AT = 3  # within the first epoch
SICK_AT = 2

Job = Callable[[], dict[str, Any]]


def added_for(case: str, weight: float | str | None = None) -> list[Any]:
    """The callbacks of a case; the head is silent in its first steps unless told otherwise."""
    if case == WITHOUT:
        return []
    if case == HEAD:
        return [Probe() if weight is None else Probe(weight)]
    return list(together(case, WEIGHT if weight is None else weight))


@cache
def bundles() -> list[list[str]]:
    """All cases in few trainings: those that leave the model as it is, as long as names differ.

    For a strategy that starts processes anew for every training.
    """
    found: list[list[str]] = []
    taken: list[set[str]] = []
    for case in TRAINED:
        names = {each.name for each in with_companions(added_for(case))}
        alone = case == HEAD or not ENTRIES[case].inert
        fits = (i for i, each in enumerate(taken) if not alone and each and not each & names)
        place = next(fits, None)
        if place is None:
            found.append([case])
            taken.append(set() if alone else names)
        else:
            found[place].append(case)
            taken[place] |= names
    return found


def bundle_of(case: str) -> list[str]:
    """The cases that train together with this one."""
    return next(each for each in bundles() if shared(case) in each)


def has_teacher(case: str) -> bool:
    """Whether another set of weights of the model is held."""
    return any(map(holds_weights, with_companions(added_for(case))))


def jobs(place: Place, folder: Path) -> dict[str, Job]:
    """Every job of a place by its name."""
    found: dict[str, Job] = {"warm-up": partial(trained, place, WITHOUT, "sgd")}
    cases = [case for case in TRAINED if not (place.sharded and case in REFUSED)]
    for case in [WITHOUT, *cases]:
        for variant in VARIANTS:
            found[f"{variant} {case}"] = partial(trained, place, case, variant)
        found[f"weight 0 {case}"] = partial(at_weight_zero, place, case)
        found[f"exception {case}"] = partial(ended_by_exception, place, case)
        for form in FORMS if place.sharded else ["file"]:
            found[f"{form} {case}"] = partial(resumed, place, folder, case, form)
        found[f"file, BatchNorm {case}"] = partial(resumed, place, folder, case, "file", norm=True)
    for case in cases:
        found[f"order {case}"] = partial(in_both_orders, place, case)
        found[f"unknown path {case}"] = partial(unknown_path, place, case)
        found[f"sizes {case}"] = partial(different_sizes, place, case)
        if has_teacher(case):
            found[f"collectives {case}"] = partial(collectives, place, case)
    for kind in ("raise", "skip"):
        found[f"nan {kind}"] = partial(nan_on_one_rank, place, kind)
    found["watched"] = partial(watched, place)
    found["routed"] = partial(routed, place)
    for case in (HEAD, "self_distillation_features", WITHOUT):
        found[f"two backwards {case}"] = partial(in_two_backwards, place, case)
    for case in ("self_distillation_features", HEAD):
        found[f"compiled {case}"] = partial(compiled, place, case)
    found["wandb"] = partial(one_wandb_run, place, folder)
    for name, weight in SILENT.items():
        found[f"silent head {name}"] = partial(silent_head, place, weight)
    if place.sharded:
        for case in REFUSED:
            found[f"refused {case}"] = partial(refused, place, case)
    else:
        found["failing beside nan"] = partial(failing_beside_nan, place)
        found["adversaries"] = partial(adversaries, place)
        for entry in TERMS:
            found[f"empty {entry}"] = partial(empty_batch, place, entry)
        for name, weight in SILENT.items():
            static = {"static_graph": True}
            found[f"silent head {name}, static graph"] = partial(
                silent_head, place, weight, strategy=static
            )
        found["one rank"] = partial(term_on_one_rank, place)
    return found


# --------------------------------------------------------------------------------- whole trainings
def trained(place: Place, case: str, variant: str, *others: str) -> dict[str, Any]:
    model, options = VARIANTS[variant]
    added = [each for one in (case, *others) for each in added_for(one)]
    watch = Watch(added, states=variant in STATES, gradients=variant == "manual")
    rows = Rows()
    module, trainer = train(
        place, [*added, watch], model, logger=rows, log_every_n_steps=1, **options
    )
    return {
        "weights": whole_weights(module),
        "head": heads(added),
        "states": watch.states,
        "steps": watch.steps,
        "gradients": watch.gradients,
        "parts": watch.parts,
        "rows": rows.rows,
        "trace": trace(module, trainer),
        "global_step": trainer.global_step,
    }


def bits(module: Classifier, trainer: L.Trainer) -> dict[str, Any]:
    """What this process holds of weights and optimizer states, and its random state."""
    return {
        "weights": {name: parts_of(value).clone() for name, value in module.state_dict().items()},
        "optimizer": optimizer_parts(trainer),
        "random": random_state(),
    }


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The parts that are not equal to the last bit."""
    return [part for part in right if not identical(left[part], right[part])]


def at_weight_zero(place: Place, case: str) -> dict[str, Any]:
    model = {"dropout": 0.2, "norm": True, "optimizer": "adam"}
    return bits(*train(place, added_for(case, 0.0), model))


def watched(place: Place) -> dict[str, Any]:
    """A teacher's pass and a second pass of the student in every step, at weight 0."""
    teacher = EMATeacher(decay=0.5)
    watching = WatchingTwice(teacher.name)
    model = {"dropout": 0.2, "norm": True, "optimizer": "adam"}
    return {**bits(*train(place, [teacher, watching], model)), "seen": watching.seen}


class WatchingTwice(Watching):
    """Runs the student a second time as well."""

    def loss(self, step: Step) -> Tensor:
        return super().loss(step) + step.again().logits.square().mean()


def in_both_orders(place: Place, case: str) -> dict[str, Any]:
    """Beside a second head, before it and after it."""
    model = {"dropout": 0.2, "optimizer": "adam"}
    ended = []
    for order in (1, -1):
        other = Probe(0.3)
        other.name = "other"
        added = [*added_for(case), other]
        module, trainer = train(place, added[::order], model, max_epochs=1)
        ended.append({**bits(module, trainer), "head": heads(added)})
    return {"different": differing(*ended), "steps": trainer.global_step}


# ------------------------------------------------------------------------------------ checkpoints
def resumed(place: Place, folder: Path, case: str, form: str, norm: bool = False) -> dict[str, Any]:
    """A training that saves within its first epoch, and another that goes on from there."""
    model = {"optimizer": "adam", "reseeds": True, "norm": norm}
    path = folder / ("BatchNorm" if norm else form) / case
    strategy = {"save_distributed_checkpoint": FORMS[form]} if place.sharded else {}
    ended: list[dict[str, Any]] = []
    for ckpt_path in (None, path / f"step={SAVED_AT}.ckpt"):
        added = added_for(case, WEIGHT)
        saving = ModelCheckpoint(path, "{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
        theirs = [] if ckpt_path else [saving]
        module, trainer = train(
            place, [*added, *theirs], model, strategy=strategy, ckpt_path=ckpt_path
        )
        states = {each.name: each.state() for each in with_companions(added)}
        noted = bits(module, trainer)
        # ddp keeps BatchNorm's statistics equal; a file of a sharded model has those of process 0,
        # so on the other one they are not as if training had never stopped. Nor, then, is what a
        # teacher will take over from them with the next step.
        if place.sharded:
            parameters = {name for name, _ in module.named_parameters()}
            snapshots = [one for state in states.values() for one in state.get("snapshots", [])]
            for held in [noted, *states.values(), *snapshots]:
                if "weights" in held:
                    kept = held["weights"].items()
                    held["weights"] = {key: value for key, value in kept if key in parameters}
        ended.append({**noted, "states": states, "head": heads(added)})
    first, second = ended
    found: dict[str, Any] = {"different": differing(first, second)}
    if case == HEAD and not norm:  # the same file without the callback that has the head
        _, alone = train(place, [], model, strategy=strategy, ckpt_path=ckpt_path)
        found["alone"] = alone.global_step
    return {**found, "head": first["head"], "global_step": trainer.global_step}


def saved_by_one_process(place: Place, folder: Path, case: str) -> Path:
    """The file that one process writes where `resumed` saves."""
    added = added_for(case, WEIGHT)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    model = {"optimizer": "adam", "reseeds": True}
    train(place.one_process, [*added, saving], model)
    return folder / f"step={SAVED_AT}.ckpt"


# ----------------------------------------------------------------------------------------- trouble
class Fails(L.Callback):
    """Raises before the third batch, on every process."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise RuntimeError("stopped here")


class Keeps(L.Callback):
    """Keeps the module and the Trainer of a fit that does not return."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.trainer, self.module = trainer, pl_module


def failing(place: Place, added: list[Any], **options: Any) -> tuple[dict[str, Any], Keeps]:
    keeps, found = Keeps(), {}
    with said(found):
        train(place, [*added, keeps], **options)
    return {**found, "global_step": keeps.trainer.global_step}, keeps


def ended_by_exception(place: Place, case: str) -> dict[str, Any]:
    found, keeps = failing(place, [*added_for(case), Fails()])
    return {**found, "trace": trace(keeps.module, keeps.trainer)}


def unknown_path(place: Place, case: str) -> dict[str, Any]:
    return failing(place, [*added_for(case), Taps(logits="haed")])[0]


def refused(place: Place, case: str) -> dict[str, Any]:
    return failing(place, added_for(case))[0]


class Sick(Objective):
    """A sound term that is NaN on the second process in one step."""

    def __init__(self, rank: int, nonfinite: Literal["raise", "skip"], **arguments: Any) -> None:
        super().__init__(0.5, nonfinite=nonfinite, **arguments)
        self.rank = rank

    def loss(self, step: Step) -> Tensor:
        term = step.logits.square().mean()
        return term * float("nan") if self.rank == 1 and step.progress.steps == SICK_AT else term


def nan_on_one_rank(place: Place, nonfinite: Literal["raise", "skip"]) -> dict[str, Any]:
    sick, rows = Sick(place.rank, nonfinite), Rows()
    found, keeps = failing(place, [sick], logger=rows, log_every_n_steps=1)
    return {**found, "weights": whole_weights(keeps.module), "rows": rows.rows}


class Failing(Sick):
    """Fails on the first process in the step in which it is NaN on the second."""

    def loss(self, step: Step) -> Tensor:
        if self.rank == 0 and step.progress.steps == SICK_AT:
            raise RuntimeError("a mistake of the first process")
        return super().loss(step)


def failing_beside_nan(place: Place) -> dict[str, Any]:
    return failing(place, [Failing(place.rank, "skip")])[0]


def sickness_left_out(place: Place) -> dict[str, Tensor]:
    """One process whose term has no weight in the step in question."""
    sick = Sick(0, "raise")
    sick.weight = Steps((0.5, 0.0, 0.5), (SICK_AT, SICK_AT + 1))
    return whole_weights(train(place.one_process, [sick])[0])


# What each of two processes takes in a step; the first has 24 samples, the second 15.
SIZES = (8, 5)
ROUNDS = 3


def positions(rank: int) -> list[list[int]]:
    """The samples of each round; those of the two ranks do not overlap."""
    first = 0 if rank == 0 else SIZES[0] * ROUNDS
    size = SIZES[rank]
    return [list(range(first + each * size, first + (each + 1) * size)) for each in range(ROUNDS)]


def different_sizes(place: Place, case: str) -> dict[str, Any]:
    added = added_for(case)
    data = DataLoader(Samples(sum(SIZES) * ROUNDS), batch_sampler=positions(place.rank))
    module, _ = train(place, added, data=data, use_distributed_sampler=False)
    states = {each.name: each.state() for each in with_companions(added)}
    return {"weights": whole_weights(module), "head": heads(added), "states": states}


def different_sizes_in_turn(place: Place, case: str) -> dict[str, Any]:
    """One process that accumulates over both batches of a round: the mean of their means."""
    both = [each for pair in zip(positions(0), positions(1), strict=True) for each in pair]
    added = added_for(case)
    data = DataLoader(Samples(sum(SIZES) * ROUNDS), batch_sampler=both)
    module, _ = train(place.one_process, added, data=data, accumulate_grad_batches=2)
    states = {each.name: each.state() for each in with_companions(added)}
    return {"weights": whole_weights(module), "head": heads(added), "states": states}


class Emptied:
    """Leaves nothing of the last batch on the second process, as a filter in a collate may."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        x, y = torch.utils.data.default_collate(samples)
        keep = 0 if self.rank == 1 and len(x) < BATCH // 2 else len(x)
        return x[:keep], y[:keep]


def emptied(place: Place) -> DataLoader[Any]:
    """Three batches, the last of which is empty on the second process."""
    collate = Emptied(place.rank)
    return DataLoader(Samples(BATCH * 2 + 4), batch_size=BATCH // 2, collate_fn=collate)


def empty_batch(place: Place, entry: str) -> dict[str, Any]:
    return failing(place, callbacks(entry, 0.5), data=emptied(place))[0]


class OnFirstRank(Objective):
    """Has something to say on the first process only; its head is not used on the other."""

    def __init__(self, rank: int) -> None:
        super().__init__(0.5, reads=("encoder",))
        self.rank = rank

    def build_head(self, module: nn.Module) -> nn.Module:
        return nn.Linear(8, 4)

    def loss(self, step: Step) -> Tensor:
        if self.rank == 1:
            return step.logits.new_zeros(())
        return F.cross_entropy(self.head(step.features("encoder")), step.target)


class Synchronising(Classifier):
    """Logs its own loss over all processes."""

    def total_loss(self, batch: Any) -> Tensor:
        loss = super().total_loss(batch)
        self.log("theirs", loss, sync_dist=True)
        return loss


def term_on_one_rank(place: Place) -> dict[str, Any]:
    objective, rows = OnFirstRank(place.rank), Rows()
    module, trainer = train(
        place, [objective], kind=Synchronising, logger=rows, log_every_n_steps=1
    )
    return {
        "weights": whole_weights(module),
        "head": heads([objective]),
        "keys": [sorted(row) for row in rows.rows],
        "global_step": trainer.global_step,
    }


# ---------------------------------------------------------------------------- further user modules
class Halved(Classifier):
    """One optimizer step of two backwards, each of half the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(self.total_loss(batch) / 2)
        optimizer.step()


def of_kind(place: Place, mixed_in: type, one_process: bool) -> type[Classifier]:
    """The place's model with other methods."""
    base = place.whole if one_process else place.model
    return type(mixed_in.__name__, (mixed_in, base), {})  # type: ignore[return-value]


def in_two_backwards(place: Place, case: str) -> dict[str, Any]:
    added = added_for(case, 0.5)
    kind = of_kind(place, Halved, place.processes == 1)
    module, trainer = train(place, added, {"manual": True}, kind=kind)
    return {
        "weights": whole_weights(module),
        "head": heads(added),
        "global_step": trainer.global_step,
    }


class Own(nn.Sequential):
    """A class of the user's own: `compile()` of a bare `nn.Sequential` compiles nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


class InGraphs(Classifier):
    """The encoder is compiled, and counts how often its graph runs."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.encoder = Own(*self.encoder)
        self.runs = 0
        self.encoder.compile(backend=self._counted, dynamic=False)

    def _counted(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph(*arguments)

        return run


def compiled(place: Place, case: str) -> dict[str, Any]:
    torch._dynamo.reset()
    added = added_for(case)
    module, _ = train(place, added, kind=of_kind(place, InGraphs, place.processes == 1))
    return {"weights": whole_weights(module), "head": heads(added), "runs": module.runs}


class Adversaries(L.LightningModule):
    """A generator and a discriminator, each with an optimizer, toggled in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(FEATURES, FEATURES)
        self.discriminator = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(self.generator(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(F.softplus(-self(x)).mean())
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        real = F.softplus(-self.discriminator(x)).mean()
        self.manual_backward(real + F.softplus(self(x)).mean())
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.SGD(each.parameters(), 0.1) for each in parts]


class Small(Objective):
    """A head on one part, which trains with that part's optimizer."""

    def __init__(self, name: str, reads: str, width: int, optimizer: int) -> None:
        super().__init__(0.5, name, reads=reads, optimizer=optimizer)
        self.width = width

    def build_head(self, module: nn.Module) -> nn.Module:
        return nn.Linear(self.width, 2)

    def loss(self, step: Step) -> Tensor:
        return (self.head(step.features(self.reads[0])) - 1).square().mean()


def adversaries(place: Place) -> dict[str, Any]:
    """A head and a teacher for each optimizer."""
    parts = [
        Small("of_generator", "generator", FEATURES, 0),
        Small("of_discriminator", "discriminator.1", HIDDEN, 1),
    ]
    teachers = [EMATeacher(0.5, "first", optimizer=0), EMATeacher(0.5, "second", optimizer=1)]
    strategy = {} if place.processes == 1 else {"find_unused_parameters": True}
    module, _ = train(place, [*parts, *teachers], kind=Adversaries, strategy=strategy, max_epochs=1)
    return {
        "weights": whole_weights(module),
        "head": heads(parts),
        "teachers": [each.state() for each in teachers],
    }


# ------------------------------------------------------------------------------------------- heads
SILENT: dict[str, Any] = {
    "at first": f"late(0.5, start={STEPS // 2})",
    "every second step": Steps(
        tuple(0.5 * (step % 2) for step in range(STEPS)), tuple(range(1, STEPS))
    ),
    "always": 0.0,
}


class HeadGradients(L.Callback):
    """The largest entry of a head's gradient before each optimizer step."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.largest: list[float] = []

    def on_before_optimizer_step(self, *_: Any) -> None:
        grads = [parts_of(each.grad) for each in self.probe.head.parameters()]
        self.largest.append(max(float(each.abs().max()) for each in grads if each.numel()))


def silent_head(place: Place, weight: Any, **options: Any) -> dict[str, Any]:
    probe = Probe(weight)
    gradients = HeadGradients(probe)
    module, _ = train(place, [probe, gradients], **options)
    return {
        "weights": whole_weights(module),
        "head": heads([probe]),
        "gradients": gradients.largest,
    }


# ----------------------------------------------------------------------------------- communication
def collectives(place: Place, case: str) -> dict[str, Any]:
    added = added_for(case)
    counting = Collectives(added)
    train(place, [counting, *added])
    return {"moves": counting.moves, "issued": counting.issued, "seen": counting.seen}


ASKED = ([3, 0], [1, 3, 2, 0])


def routed(place: Place) -> dict[str, Any]:
    """Of five rows, 0, 10, ..., 40, the first process asks for two and the second for four."""
    cpu, index = torch.device("cpu"), torch.tensor(ASKED[place.rank])
    held = torch.arange(5.0)[place.rank :: 2] * 10
    route, none = Route(index, cpu), Route(index[: 4 * place.rank], cpu)
    return {
        "brought": route.bring(held[route.places]),
        "doubled": route.bring(torch.stack([held, 2 * held], dim=1)[route.places]),
        "sent": route.send(index + 100 * place.rank),
        "first asks for none": none.bring(held[none.places]),
        "first sends none": none.send(index[: len(none)]),
        "places": route.places,
    }


def one_wandb_run(place: Place, folder: Path) -> dict[str, Any]:
    """How often a run begins, with us and without: a logger begins its own on first use."""
    import wandb  # takes a second, and only this job needs it

    real, started = wandb.init, []

    def noted(**arguments: Any) -> Any:
        started.append(place.rank)
        return real(**arguments | {"mode": "disabled", "dir": str(folder)})

    wandb.init = noted
    counts = []
    try:
        for added in ([EMATeacher(), SelfDistillation(weight=0.5), Probe(0.5)], []):
            logger = WandbLogger(save_dir=str(folder))
            before = len(started)
            attaching = quiet_trainer(added, logger=logger)  # where nothing may begin yet
            counts.append([len(started) - before])
            train(place, added, logger=logger, log_every_n_steps=1)
            counts[-1].append(len(started) - before)
            wandb.finish()  # the next logger would take this run over
            assert attaching.global_step == 0
    finally:
        wandb.init = real
    with_us, without = counts
    return {"with us": with_us, "without": without}
