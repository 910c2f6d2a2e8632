"""Averages, validation and checkpoints: what other averaging callbacks got wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_aux import (
    AttributeSchedule,
    AuxiliaryError,
    DropoutSchedule,
    EMAAnchor,
    EMATeacher,
    FrozenTeacher,
    SelfDistillation,
    StochasticDepthSchedule,
)
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier, EpochShuffle
from tests.contract.probe import Probe
from tests.contract.training import (
    callbacks,
    fit,
    identical,
    loader,
    optimizer_state,
    quiet_trainer,
    seeded,
    weights,
)

MODEL: dict[str, Any] = {"dropout": 0.2, "norm": True, "optimizer": "adam", "reseeds": True}
STEPS = 5  # per epoch
CASES = [*ENTRIES, "head"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning.pytorch")
every_case = pytest.mark.parametrize("case", CASES)


def attached(case: str, weight: float = 0.5) -> list[Any]:
    """The callbacks of a case; no time in them depends on the length of the training."""
    if case == "head":
        return [Probe(weight)]
    if case == "dropout_schedule":
        return [DropoutSchedule(p=0.3, until=12, shape="linear")]
    if case == "stochastic_depth_schedule":
        return [StochasticDepthSchedule(1.0, "encoder.1", mode="early", until=7)]
    if case == "attribute_schedule":
        return [AttributeSchedule({"optimizer.lr": "linear(0.2, 0.05, until=12)"})]
    return list(callbacks(case, weight))


def shuffled() -> Any:
    return loader(8 * STEPS, sampler=EpochShuffle(8 * STEPS))


def members(added: Sequence[Any]) -> list[Any]:
    """With those that others bring along."""
    return [each for one in added for each in (one, *one.companions())]


# ------------------------------------------------------------ F01, validation
class Seen(Classifier):
    """Notes the weights that each validation batch is computed with, and its loss."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.during: list[dict[str, Tensor]] = []
        self.after_last_step: dict[str, Tensor] = {}
        self.same: list[bool] = []
        self.losses: list[Tensor] = []

    def on_train_start(self) -> None:
        self.same.clear()  # the sanity check's

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_last_step = weights(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.same.append(identical(weights(self), self.after_last_step))
        loss = self.total_loss(batch)
        self.losses.append(loss.detach())
        self.log("val_loss", loss)


@pytest.mark.parametrize("start", [0, 4, 1000])
def test_f01_every_validation_sees_the_live_weights_whenever_the_average_starts(start: int) -> None:
    """`start` beyond the end of training: no average exists in any of the validations."""
    losses = []
    for added in ([], [EMATeacher(decay=0.9, start=start), SelfDistillation(weight=0.0)]):
        module = seeded(Seen, **MODEL)
        fit(module, added, shuffled(), loader(16), val_check_interval=2)
        assert module.same == [True] * 8  # two validations an epoch, two batches each
        losses.append(module.losses)
        if added and start > 10:
            assert added[0].updates == 0
            assert added[0].store is None
    assert identical(*losses)


# ------------------------------------------------------------ F02, F03: what is saved
class Recorder(L.Callback):
    """The live weights and the teacher's, as they are at the end of every batch."""

    def __init__(self, teacher: EMATeacher) -> None:
        self.teacher = teacher
        self.live: dict[int, dict[str, Tensor]] = {}
        self.average: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert self.teacher.store is not None
        step = trainer.global_step
        self.live[step] = weights(module)
        parameters = [name for name, _ in module.named_parameters()]
        average = self.teacher.store.state_dict()
        self.average[step] = {name: average[name].clone() for name in parameters}


@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["epoch end", "after validation"])
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
def test_f02_in_every_file_the_raw_weights_and_the_average_are_each_in_their_own_place(
    tmp_path: Path, ours_first: bool, at_epoch_end: bool
) -> None:
    teacher = EMATeacher(decay=0.6)
    recorder = Recorder(teacher)
    ours = [teacher, SelfDistillation(weight=0.5), recorder]
    saving = [
        ModelCheckpoint(
            tmp_path / "best",
            "{step}",
            monitor="val_loss",
            save_top_k=-1,
            save_last=True,
            save_on_train_epoch_end=at_epoch_end,
        ),
        ModelCheckpoint(tmp_path / "every", "{step}", every_n_train_steps=2, save_top_k=-1),
    ]
    added = [*ours, *saving] if ours_first else [*saving, *ours]
    fit(seeded(Classifier, **MODEL), added, shuffled(), loader(16), max_epochs=3)
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert len(files) == 3 + 1 + 7
    for path in files:
        saved = torch.load(path, weights_only=True)
        step = saved["global_step"]
        assert identical(dict(saved["state_dict"]), recorder.live[step])
        average = saved["lightning_aux"]["members"]["ema"]["weights"]
        parameters = {name: average[name] for name in recorder.average[step]}
        assert identical(parameters, recorder.average[step])
        assert not identical(parameters, {n: saved["state_dict"][n] for n in parameters})


class Losses(Classifier):
    """Keeps the loss of every training batch by the step that it belongs to."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.of_step: dict[int, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.of_step[self.global_step] = loss.detach()
        return loss


@every_case
def test_f03_a_run_resumed_from_a_file_of_a_validation_goes_on_from_the_raw_weights(
    tmp_path: Path, case: str
) -> None:
    """With Lightning's default of two sanity batches, before the resumed training too."""

    def run(
        ckpt_path: Path | None = None, *more: L.Callback
    ) -> tuple[dict[int, Tensor], dict[str, Any]]:
        module, added = seeded(Losses, **MODEL), attached(case)
        if ckpt_path is not None:
            nn.init.zeros_(module.head.weight)
        trainer = fit(
            module, [*added, *more], shuffled(), loader(16), max_epochs=4, ckpt_path=ckpt_path
        )
        assert trainer.num_sanity_val_steps == 2
        ended = {"weights": weights(module), "optimizer": optimizer_state(trainer)}
        return module.of_step, {**ended, "ours": [each.state() for each in members(added)]}

    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    losses, expected = run(None, saving)
    resumed, actual = run(tmp_path / f"step={2 * STEPS}.ckpt")
    assert list(resumed) == list(range(2 * STEPS, 4 * STEPS))
    assert identical(list(resumed.values()), [losses[step] for step in resumed])
    assert identical(actual, expected)


# ------------------------------------------------------------ F05: after the end of a fit
@pytest.mark.parametrize("file", ["last", "saved after fit"])
@pytest.mark.parametrize("case", [*CASES, "nothing of ours"])
def test_f05_a_finished_run_can_be_continued_as_if_it_had_never_ended(
    tmp_path: Path, case: str, file: str
) -> None:
    def added() -> list[Any]:
        return [] if case == "nothing of ours" else attached(case)

    def ended(module: Any, trainer: L.Trainer, ours: list[Any]) -> dict[str, Any]:
        states = [each.state() for each in members(ours)]
        return {
            "weights": weights(module),
            "optimizer": optimizer_state(trainer),
            "ours": states,
            "heads": [weights(each.head) for each in ours if hasattr(each, "head")],
        }

    whole, ours = seeded(Classifier, **MODEL), added()
    expected = ended(whole, fit(whole, ours, shuffled(), max_epochs=4), ours)

    first, ours = seeded(Classifier, **MODEL), added()
    saving = ModelCheckpoint(tmp_path, "last")
    trainer = fit(first, [*ours, saving], shuffled(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "saved after fit.ckpt")
    path = tmp_path / f"{file}.ckpt"
    saved = torch.load(path, weights_only=True)
    assert identical(dict(saved["state_dict"]), weights(first))

    rest, ours = seeded(Classifier, **MODEL), added()
    trainer = fit(rest, ours, shuffled(), max_epochs=4, ckpt_path=path)
    assert trainer.global_step == 4 * STEPS
    assert identical(ended(rest, trainer, ours), expected)


# ------------------------------------------------------------ F10: files with other contents
class FirstTeacher(L.Callback):
    """The teacher's weights and the live ones when the first batch begins."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.seen: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.seen is None:
            live, held = weights(module), self.teacher.store.state_dict()
            assert live.keys() == held.keys()
            self.seen = {name: held[name].clone() for name in live}, live


def finished(folder: Path, added: list[Any]) -> Path:
    """The file of a finished epoch."""
    trainer = fit(seeded(Classifier, **MODEL), added, shuffled(), max_epochs=1)
    trainer.save_checkpoint(folder / "finished.ckpt")
    return folder / "finished.ckpt"


@pytest.mark.parametrize("kind", [EMATeacher, FrozenTeacher])
@pytest.mark.parametrize("before", ["nothing of ours", "another teacher"])
def test_f10_a_file_that_lacks_the_average_starts_it_from_the_loaded_weights_and_says_so_once(
    tmp_path: Path, before: str, kind: Any, recwarn: pytest.WarningsRecorder
) -> None:
    path = finished(tmp_path, [] if before == "nothing of ours" else [EMATeacher(name="other")])
    teacher, module = kind(name="new"), seeded(Classifier, **MODEL)
    nn.init.zeros_(module.head.weight)
    first = FirstTeacher(teacher)
    recwarn.clear()
    fit(module, [teacher, SelfDistillation("new"), first], shuffled(), ckpt_path=path)
    said = [str(each.message) for each in recwarn if "lightning_aux" in str(each.message)]
    assert len(said) == 1
    assert "start fresh from the loaded weights" in said[0]
    assert first.seen is not None
    assert identical(*first.seen)
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert identical(first.seen[1], dict(loaded))


@pytest.mark.parametrize("use", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("ours", [True, False], ids=["with us", "without us"])
@pytest.mark.parametrize("saved_with_us", [True, False], ids=["saved with us", "saved without us"])
def test_f10_every_file_serves_every_use_with_and_without_us(
    tmp_path: Path, saved_with_us: bool, ours: bool, use: str
) -> None:
    class Usable(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            used.append(weights(self))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            used.append(weights(self))

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            used.append(weights(self))

    def some() -> list[Any]:
        return [EMATeacher(), SelfDistillation(), EMAAnchor(), Probe(0.5)]

    used: list[dict[str, Tensor]] = []
    path = finished(tmp_path, some() if saved_with_us else [])
    module = seeded(Usable, **MODEL)
    nn.init.zeros_(module.head.weight)
    trainer = quiet_trainer(some() if ours else [])
    if use == "fit":
        trainer.fit(module, shuffled(), ckpt_path=path)
        assert trainer.global_step == 2 * STEPS
    else:
        getattr(trainer, use)(module, loader(16), ckpt_path=path)
        expected = dict(torch.load(path, weights_only=True)["state_dict"])
        assert len(used) == 2
        assert all(identical(each, expected) for each in used)


def test_f10_a_model_with_another_head_starts_from_loaded_parts_and_is_told_of_whole_ones(
    tmp_path: Path,
) -> None:
    """Fine-tuning: a changed head is no trouble for an average, and named where a file is read."""

    class Retargeted(Classifier):
        def __init__(self) -> None:
            super().__init__(**MODEL)
            self.head = nn.Linear(8, 7)

    path = finished(tmp_path, [EMATeacher()])
    saved = torch.load(path, weights_only=True)["state_dict"]
    module = seeded(Retargeted)
    module.load_state_dict({n: v for n, v in saved.items() if n.startswith("encoder")}, False)
    teacher = EMATeacher()
    first = FirstTeacher(teacher)
    fit(module, [teacher, SelfDistillation(), first], shuffled(), max_epochs=1)
    assert first.seen is not None
    assert identical(*first.seen)
    assert torch.equal(first.seen[0]["encoder.0.weight"], saved["encoder.0.weight"])
    with pytest.raises(AuxiliaryError, match=r"'head\.weight' has shape \(4, 8\) in the saved"):
        fit(seeded(Retargeted), [FrozenTeacher(checkpoint=path)], shuffled())


# ------------------------------------------------------------ F31: the size of files
class Wide(Classifier):
    """Far more parameters than a `Classifier`: its weights are nearly all of its file."""

    def __init__(self) -> None:
        super().__init__(optimizer="sgd")
        self.encoder = nn.Sequential(nn.Linear(6, 4000), nn.Tanh(), nn.Linear(4000, 8))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_f31_a_teacher_that_is_read_from_a_file_is_not_stored_in_every_checkpoint(
    tmp_path: Path,
) -> None:
    """Its weights are in the file that it is read from; a resumed run reads them there again."""
    torch.save(seeded(Wide).state_dict(), tmp_path / "teacher.pt")

    def size(name: str, added: list[Any]) -> int:
        trainer = fit(seeded(Wide), added, max_epochs=1)
        trainer.save_checkpoint(tmp_path / name)
        return (tmp_path / name).stat().st_size

    def added() -> list[Any]:
        return [FrozenTeacher(checkpoint=tmp_path / "teacher.pt"), SelfDistillation("frozen")]

    without, with_us = size("without.ckpt", []), size("with.ckpt", added())
    assert with_us < 1.01 * without
    trainer = fit(seeded(Wide), added(), max_epochs=2, ckpt_path=tmp_path / "with.ckpt")
    assert trainer.global_step == 2 * STEPS


def test_f31_no_teacher_adds_a_trainable_parameter() -> None:
    """Neither to the module nor to the optimizer."""
    trainable: list[list[str]] = []
    optimized: list[list[int]] = []

    class Counting(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            trainable.append([n for n, each in module.named_parameters() if each.requires_grad])
            groups = trainer.optimizers[0].param_groups
            optimized.append([id(each) for group in groups for each in group["params"]])

    module = seeded(Classifier)
    names = [name for name, each in module.named_parameters() if each.requires_grad]
    fit(module, [EMATeacher(), FrozenTeacher(), SelfDistillation(), Counting()], max_epochs=1)
    assert trainable == [names] * 5
    assert optimized == [[id(each) for each in module.parameters()]] * 5


# ------------------------------------------------------------ F78: names in a file
def named(value: Any) -> Any:
    """The nest with everything added to its dictionaries that has ever made a reader run code."""
    if isinstance(value, dict):
        names = {"_instantiator": "os.system", "class_path": "os.system", "_target_": "os.system"}
        return {key: named(each) for key, each in value.items()} | names
    return [named(each) for each in value] if isinstance(value, list) else value


def test_f78_names_of_functions_in_our_part_of_a_file_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, and read by a teacher; what is not ours is skipped."""

    def added() -> list[Any]:
        return [EMATeacher(), SelfDistillation(), EMAAnchor(), FrozenTeacher()]

    path = finished(tmp_path, added())
    saved = torch.load(path, weights_only=True)
    ours = saved["lightning_aux"]
    for entry in (ours, *(ours["members"].values())):  # weights are names of tensors alone
        inner = {key: each for key, each in entry.items() if not isinstance(each, dict)}
        entry.update(named(inner))
    torch.save(saved, path)
    ran: list[Any] = []
    monkeypatch.setattr("os.system", lambda *command: ran.append(command))
    reading = FrozenTeacher("other", checkpoint=path)
    trainer = fit(
        seeded(Classifier, **MODEL), [*added(), reading], shuffled(), max_epochs=2, ckpt_path=path
    )
    assert trainer.global_step == 2 * STEPS
    assert ran == []


# ------------------------------------------------------------ F80: plain contents only
PLAIN = (Tensor, bool, int, float, str, type(None))


def not_plain(value: Any, path: str = "lightning_aux") -> list[str]:
    """Where in a nest something is neither a tensor nor a plain value."""
    if isinstance(value, dict):
        keys = [f"{path}: key {key!r}" for key in value if not isinstance(key, str | int)]
        return keys + [
            found for k, each in value.items() for found in not_plain(each, f"{path}.{k}")
        ]
    if isinstance(value, list | tuple):  # an optimizer's betas are a tuple in the user's part too
        return [found for i, each in enumerate(value) for found in not_plain(each, f"{path}.{i}")]
    return [] if type(value) in PLAIN else [f"{path}: {type(value).__name__}"]


@every_case
def test_f80_resuming_with_us_needs_nothing_but_plain_contents(tmp_path: Path, case: str) -> None:
    """`weights_only=True` when the file is read and when training resumes from it."""
    path = finished(tmp_path, attached(case))
    saved = torch.load(path, weights_only=True)
    assert not_plain(saved["lightning_aux"]) == []
    module, added = seeded(Classifier, **MODEL), attached(case)
    trainer = quiet_trainer(added)
    trainer.fit(module, shuffled(), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 2 * STEPS
