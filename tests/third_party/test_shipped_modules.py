"""Three objectives on unmodified LightningModules that other packages ship (`shipped_modules.py`).

One on the output, one on features with a head, one with an average of the weights. `make
test-third-party` makes an environment that has all of the packages; elsewhere those that are not
installed are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_aux as aux
from tests.contract.training import identical
from tests.third_party import shipped_modules
from tests.third_party.shipped_modules import BATCHES, SHIPPED, Resumable, Shipped

SCRIPT = Path(__file__).with_name("plain_script.py")  # never imported here: it blocks the package
EPOCHS = 3
DECAY = 0.5


class Probe(aux.Objective):
    """A regression to 1 from the features, by a linear head of its own."""

    def __init__(self, shipped: Shipped, weight: float, **arguments: Any) -> None:
        super().__init__(weight, reads=(shipped.feature,), **arguments)
        self.shipped = shipped

    def build_head(self, module: nn.Module) -> nn.Module:
        return nn.Linear(self.shipped.width, 1)

    def loss(self, step: aux.Step) -> Tensor:
        features = self.shipped.pick(step.features(self.shipped.feature))
        return (self.head(features) - 1).square().mean()


class Look(aux.Objective):
    """Adds nothing and keeps what ``look(step)`` returned in every step."""

    def __init__(self, look: Callable[[aux.Step], Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.look = look
        self.seen: list[Any] = []

    def loss(self, step: aux.Step) -> Tensor:
        self.seen.append(self.look(step))
        return step.loss * 0.0


def output_one(shipped: Shipped, weight: float) -> list[L.Callback]:
    if shipped.classifies:
        objective = aux.SelfDistillation(weight=weight, **shipped.arguments)
    else:
        objective = aux.SelfDistillation(
            on=lambda one: one.logits, divergence="mse", weight=weight, **shipped.arguments
        )
    return [aux.EMATeacher(decay=DECAY), objective]


def feature_one(shipped: Shipped, weight: float) -> list[L.Callback]:
    return [Probe(shipped, weight, **shipped.arguments)]


def average_one(shipped: Shipped, weight: float) -> list[L.Callback]:
    space = "output" if shipped.classifies else "weight"
    return [aux.EMAAnchor(space, weight=weight, decay=DECAY, **shipped.arguments)]


KINDS = {"self_distillation": output_one, "probe": feature_one, "ema_anchor": average_one}
every_kind = pytest.mark.parametrize("kind", KINDS)


def all_three(shipped: Shipped, weight: float = 1.0) -> list[L.Callback]:
    taps = [aux.Taps(**shipped.taps)] if shipped.taps else []
    return taps + [each for make in KINDS.values() for each in make(shipped, weight)]


class Logged(L.Callback):
    """Keeps everything of ours that is logged in each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.rows.append({name: float(metrics[name]) for name in metrics if "aux/" in name})


class Reseeded(L.Callback):
    """Seeds dropout and sampling by the batch, which no checkpoint holds."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        torch.manual_seed(1000 + trainer.fit_loop.epoch_loop.total_batch_idx)


class Saving(L.Callback):
    """Saves after the batch of that number, counted from 0."""

    def __init__(self, after: int, path: Path) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.after:
            trainer.save_checkpoint(self.path)


@pytest.fixture(params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Iterator[Shipped]:
    """An installed one, under the default dtype that it asks for."""
    chosen = SHIPPED[request.param]
    yield from in_its_dtype(chosen)


def in_its_dtype(chosen: Shipped) -> Iterator[Shipped]:
    for name in chosen.imports:
        pytest.importorskip(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(chosen.dtype)
    yield chosen
    torch.set_default_dtype(before)


def built(shipped: Shipped) -> tuple[Any, Any]:
    L.seed_everything(3, verbose=False)
    return shipped.build()


def train(
    shipped: Shipped, added: list[L.Callback], folder: Path, epochs: int = EPOCHS, **fitted: Any
) -> tuple[Any, L.Trainer]:
    """The module after training on its package's own loader, from the same state every time."""
    module, loader = built(shipped)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=added,
    )  # fmt: skip
    L.seed_everything(4, verbose=False)
    if "ckpt_path" in fitted or any(isinstance(each, Saving) for each in added):
        loader = Resumable(loader)
    trainer.fit(module, loader, **fitted)
    return module, trainer


def ended(module: Any, trainer: L.Trainer) -> dict[str, Any]:
    return deepcopy(
        {
            "weights": dict(module.state_dict()),
            "optimizers": [each.state_dict()["state"] for each in trainer.optimizers],
        }
    )


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [part for part in one if not identical(one[part], other[part])]


# -------------------------------------------------------------------------------------------- train
def test_every_term_is_logged_and_the_total_is_main_plus_weighted_terms(shipped, tmp_path):
    logged = Logged()
    train(shipped, [*all_three(shipped, 0.5), logged], tmp_path)
    assert len(logged.rows) == EPOCHS * BATCHES
    for row in logged.rows:
        terms = [row[f"aux/{kind}"] for kind in KINDS]
        assert all(term >= 0 for term in terms)
        assert row["aux/total"] == pytest.approx(row["aux/main"] + 0.5 * sum(terms), rel=1e-5)
    for kind in KINDS:  # in the first step a teacher may still be the student
        assert all(row[f"aux/{kind}"] > 0 for row in logged.rows[1:]), kind


@every_kind
def test_a_term_moves_the_weights(shipped, kind, tmp_path):
    taps = [aux.Taps(**shipped.taps)] if shipped.taps else []
    plain, _ = train(shipped, [Reseeded()], tmp_path)
    moved, _ = train(shipped, [*taps, *KINDS[kind](shipped, 10.0), Reseeded()], tmp_path)
    distance = max(
        float((one.double() - other.double()).abs().max())
        for one, other in zip(plain.parameters(), moved.parameters(), strict=True)
    )
    assert distance > 1e-5


def test_weight_zero_leaves_training_bit_identical(shipped, tmp_path):
    """Also the random numbers that are drawn: nothing is seeded again on the way."""
    plain = ended(*train(shipped, [], tmp_path))
    random = torch.get_rng_state()
    module, trainer = train(shipped, all_three(shipped, 0.0), tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert differing(ended(module, trainer), plain) == []


# ------------------------------------------------------------------------------------- what is seen
def test_the_teachers_output_is_that_of_a_copy_with_its_weights(shipped, tmp_path):
    """In every step, though the model may write into the batch or switch gradients on itself."""
    reference, _ = built(shipped)
    reference.eval()
    expected = []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            with torch.no_grad(), torch.random.fork_rng():
                expected.append(shipped.run(reference, deepcopy(batch)).detach())

    look = Look(lambda step: step.teacher("frozen").logits, **shipped.arguments)
    taps = [aux.Taps(**shipped.taps)] if shipped.taps else []
    train(shipped, [*taps, aux.FrozenTeacher(), look, Before()], tmp_path)
    assert len(look.seen) == len(expected) == EPOCHS * BATCHES
    for seen, each in zip(look.seen, expected, strict=True):
        torch.testing.assert_close(seen.reshape(each.shape), each, rtol=1e-6, atol=1e-7)
        assert not seen.requires_grad


def test_taps_reach_into_the_nested_batch_by_key_path(shipped, tmp_path):
    looks = [
        Look(
            lambda step, path=path: (step.target, shipped.paths[path](step.batch)),
            name=f"look_{position}",
            taps=aux.Taps(target=path),
            **shipped.arguments,
        )
        for position, path in enumerate(shipped.paths)
    ]
    train(shipped, list(looks), tmp_path, epochs=1)
    for look in looks:
        assert len(look.seen) == BATCHES
        for found, expected in look.seen:
            assert isinstance(found, Tensor)
            assert found is expected


# ----------------------------------------------------------------------------------- resume, saving
def test_premise_resume_is_exact_without_us(shipped, tmp_path):
    path = tmp_path / "half.ckpt"
    whole = ended(*train(shipped, [Reseeded(), Saving(BATCHES, path)], tmp_path))
    resumed = train(shipped, [Reseeded()], tmp_path, ckpt_path=path, weights_only=False)
    assert (differing(ended(*resumed), whole) == []) == shipped.resumes_exactly


def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one(shipped, tmp_path):
    if not shipped.resumes_exactly:
        pytest.skip("it is not without us either, see the premise")
    path = tmp_path / "half.ckpt"
    first, again = all_three(shipped), all_three(shipped)
    whole = ended(*train(shipped, [*first, Reseeded(), Saving(BATCHES, path)], tmp_path))
    added = [*again, Reseeded()]
    resumed = train(shipped, added, tmp_path, ckpt_path=path, weights_only=False)
    assert differing(ended(*resumed), whole) == []
    for one, other in zip(first, again, strict=True):
        assert identical(one.state(), other.state()), one
        if isinstance(one, Probe):
            assert identical(one.head.state_dict(), other.head.state_dict())


def test_the_module_is_left_as_it_was_found(shipped, tmp_path):
    plain, _ = train(shipped, [], tmp_path, epochs=1)
    attached, _ = train(shipped, all_three(shipped), tmp_path, epochs=1)
    assert sorted(attached.__dict__) == sorted(plain.__dict__)
    assert [n for n, _ in attached.named_modules()] == [n for n, _ in plain.named_modules()]
    for one, other in zip(attached.modules(), plain.modules(), strict=True):
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert one.training == other.training


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every installed one a checkpoint with us, and in `without` one of the same run without."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "without").mkdir()
    for name, chosen in SHIPPED.items():
        try:
            for each in in_its_dtype(chosen):
                for added, place in (([], folder / "without"), (all_three(each), folder)):
                    _, trainer = train(each, added, folder)
                    trainer.save_checkpoint(place / f"{name}.ckpt")
        except pytest.skip.Exception:
            continue
    return folder


@pytest.fixture(scope="module")
def outcomes(checkpoints: Path) -> dict[str, str]:
    """What the process that cannot import us said about each checkpoint."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), shipped_modules.__file__, str(checkpoints)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=checkpoints, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    said: dict[str, str] = json.loads((checkpoints / "outcomes.json").read_text())
    return said


def installed(name: str) -> None:
    for each in SHIPPED[name].imports:
        pytest.importorskip(each)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_checkpoint_has_the_users_keys_and_one_of_ours(checkpoints, name):
    installed(name)
    saved = torch.load(checkpoints / f"{name}.ckpt", weights_only=False)
    without = torch.load(checkpoints / "without" / f"{name}.ckpt", weights_only=False)
    assert list(saved["state_dict"]) == list(without["state_dict"])
    assert set(saved) - set(without) == {"lightning_aux"}
    assert list(saved["callbacks"]) == list(without["callbacks"])
    for ours, theirs in zip(saved["optimizer_states"], without["optimizer_states"], strict=True):
        # A term on the weights gives a gradient to parameters that the package's loss never uses.
        known = {each for group in theirs["param_groups"] for each in group["params"]}
        assert set(theirs["state"]) <= set(ours["state"]) <= known
        assert len(ours["param_groups"]) == len(theirs["param_groups"])
        for one, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert one["params"] == other["params"]


def can_be_read(path: Path) -> bool:
    """Whether `weights_only=True` accepts it: some packages put objects of their own into it."""
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", SHIPPED)
def test_a_checkpoint_that_is_safe_to_read_without_us_is_so_with_us(checkpoints, name):
    installed(name)
    without = can_be_read(checkpoints / "without" / f"{name}.ckpt")
    assert can_be_read(checkpoints / f"{name}.ckpt") == without


@pytest.mark.parametrize("name", SHIPPED)
def test_a_process_that_cannot_import_us_loads_it_strictly_and_trains_on(outcomes, name):
    installed(name)
    assert outcomes[name] == "resumed", outcomes[name]
