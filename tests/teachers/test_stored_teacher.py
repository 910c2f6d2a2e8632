"""``StoredTeacher`` and ``teach``: logits on disk, read back by the index of each sample."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightning_aux as aux
from lightning_aux.teachers import teach
from lightning_aux.teachers.storage import LogitsFile, LogitsWriter
from tests.engine.small_models import (
    CLASSES,
    WIDTH,
    Classifier,
    Probe,
    Rows,
    equal,
    largest_difference,
    rows,
    weights,
)


def trained(seed: int = 5, **arguments: Any) -> Classifier:
    """A teacher; its dropout shows whether it runs in evaluation mode."""
    torch.manual_seed(seed)
    return Classifier(dropout=0.5, **arguments)


@torch.no_grad()
def answer(module: nn.Module, x: Tensor) -> Tensor:
    modes = [each.training for each in module.modules()]
    logits: Tensor = module.eval()(x)
    for each, mode in zip(module.modules(), modes, strict=True):
        each.training = mode
    return logits


Teach = Callable[..., Path]


@pytest.fixture
def taught(plain_trainer: Any, tmp_path: Path) -> Teach:
    def write(module: Any = None, data: Any = None, folder: str = "logits", **how: Any) -> Path:
        given = rows(shuffle=True, batch_size=5, drop_last=True) if data is None else data
        trainer = plain_trainer(callbacks=how.pop("callbacks", []))
        return teach(trainer, module or trained(), given, tmp_path / folder, **how)

    return write


# ---------------------------------------------------------------------------------------- a student
@pytest.mark.parametrize("workers", [0, 1])
def test_each_sample_gets_its_own_logits_whatever_the_order(workers, taught, plain_trainer):
    """Written from a shuffled loader that drops its last batch; read in another order, twice."""
    module = trained()
    path = taught(module, storage="float32")

    def look(step: aux.Step) -> float:
        logits = step.teacher("stored").logits
        return float((logits - answer(module, step.batch[0])).abs().max())

    probe = Probe(look)
    loader = rows(shuffle=True, num_workers=workers)
    plain_trainer(max_epochs=2, callbacks=[aux.StoredTeacher(path), probe]).fit(
        Classifier(), loader
    )
    assert len(probe.seen) == 12
    assert max(probe.seen) < 1e-6


def test_a_student_learns_from_it_as_from_the_module_itself(taught, plain_trainer):
    module = trained()
    path = taught(module, storage="float32")

    def student(teacher: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = Classifier()
        term = aux.SelfDistillation(teacher.name, temperature=2.0)
        trainer = plain_trainer(max_epochs=2, callbacks=[teacher, term])
        trainer.fit(model, rows(shuffle=True, generator=torch.Generator().manual_seed(0)))
        return weights(model)

    live, stored = student(aux.FrozenTeacher(module=module)), student(aux.StoredTeacher(path))
    assert largest_difference(live, stored) < 1e-6


def test_two_teachers_at_once(taught, plain_trainer):
    """One that runs and one that is stored, against a loop by hand."""
    stored, other = trained(5), trained(6)
    path = taught(stored, storage="float32")
    torch.manual_seed(1)
    model = Classifier()
    added = [
        aux.StoredTeacher(path),
        aux.FrozenTeacher("wide", module=other),
        aux.SelfDistillation("stored", weight=0.3, name="a"),
        aux.SelfDistillation("wide", divergence="reverse_kl", weight=0.6, name="b"),
    ]
    plain_trainer(callbacks=added).fit(model, rows())

    torch.manual_seed(1)
    by_hand = Classifier()
    optimizer = by_hand.configure_optimizers()
    for x, y in rows():
        logits = by_hand(x)
        q, p, r = (z.log_softmax(-1) for z in (logits, answer(stored, x), answer(other, x)))
        forward = (p.exp() * (p - q)).sum(-1).mean()
        reverse = (q.exp() * (q - r)).sum(-1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(logits, y) + 0.3 * forward + 0.6 * reverse).backward()
        optimizer.step()
    assert largest_difference(weights(model), weights(by_hand)) < 1e-6


# ---------------------------------------------------------------------------------------- the files
def test_float16_is_within_its_rounding_and_half_the_size(taught):
    module = trained()
    whole = LogitsFile(taught(module, storage="float32", folder="a"), "test")
    half = LogitsFile(taught(module, folder="b"), "test")
    index = torch.arange(24)
    expected, found = (each.rows(index, torch.device("cpu")) for each in (whole, half))
    assert torch.equal(expected, answer(module, Rows().x))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.half().float())


@pytest.mark.parametrize("shape", [(50,), (7, 50)], ids=["classes", "sequence"])
@pytest.mark.parametrize("k", [1, 5, 49])
def test_top_k_keeps_the_softmax_of_the_k_and_spreads_the_rest_evenly(k, shape, tmp_path):
    """Against the definition, in float64: p_c of the k, and (1 − Σ p) / (C − k) of the others."""
    logits = 8 * torch.randn(20, *shape) + 300
    writer = LogitsWriter(tmp_path / "logits", 20, "top-k", k)
    for part in logits.split(6):
        writer.add(part)
    writer.finish()
    file = LogitsFile(tmp_path / "logits", "test")
    assert file.shape == (20, *shape)
    index = torch.tensor([3, 0, 19])
    found = file.rows(index, torch.device("cpu")).double().softmax(-1)
    p = logits[index].double().softmax(-1)
    kept = p >= p.topk(k).values[..., -1:]
    others = (1 - torch.where(kept, p, 0).sum(-1, keepdim=True)) / (50 - k)
    expected = torch.where(kept, p, others)
    # float16 has 11 bits: a log-probability down to −8 is within 2⁻⁹.
    assert torch.allclose(found.sum(-1), torch.ones_like(found[..., 0]))
    assert torch.allclose(found, expected, rtol=2**-6, atol=1e-6)
    sizes = {each.name: each.stat().st_size - 128 for each in (tmp_path / "logits").glob("*.npy")}
    examples = 20 * math.prod(shape[:-1])
    assert sizes["logits.npy"] == sizes["classes.npy"] == 2 * k * examples


def test_top_k_of_dense_predictions_takes_the_class_dimension(tmp_path):
    logits = torch.randn(4, 9, 2, 3)
    writer = LogitsWriter(tmp_path / "logits", 4, "top-k", 8, dim=1)
    writer.add(logits)
    writer.finish()
    found = LogitsFile(tmp_path / "logits", "test").rows(torch.arange(4), torch.device("cpu"))
    assert found.shape == logits.shape
    assert torch.allclose(found.softmax(1), logits.softmax(1), atol=2e-3)  # one class is left over


def test_only_the_rows_that_are_asked_for_are_read(tmp_path):
    """The files are mapped, not loaded."""
    writer = LogitsWriter(tmp_path / "logits", 8, "float32")
    writer.add(torch.arange(16.0).view(8, 2))
    writer.finish()
    file = LogitsFile(tmp_path / "logits", "test")
    assert isinstance(file._arrays["logits"], numpy.memmap)
    assert file.rows(torch.tensor([5, 5, 1]), torch.device("cpu")).tolist() == [
        [10.0, 11.0], [10.0, 11.0], [2.0, 3.0],
    ]  # fmt: skip


def test_the_description_says_what_is_stored(taught, plain_trainer, tmp_path):
    trainer = plain_trainer()
    trainer.fit(trained(), rows())
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    path = taught(trained(6), ckpt_path=tmp_path / "teacher.ckpt", folder="of_file")
    about = json.loads((path / "logits.json").read_text())
    assert about["shape"] == [24, CLASSES]
    assert about["storage"] == "float16"
    assert about["model"] == "tests.engine.small_models.Classifier"
    assert about["dataset"] == "Rows"
    assert len(about["checkpoint"]) == 64
    source = Classifier()
    source.load_state_dict(torch.load(tmp_path / "teacher.ckpt", weights_only=True)["state_dict"])
    found = LogitsFile(path, "test").rows(torch.arange(24), torch.device("cpu"))
    assert torch.allclose(found, answer(source, Rows().x), atol=1e-2)


# ------------------------------------------------------------------------------------ how it is run
class Submodule(Classifier):
    """The step calls a part, and the logits are an entry of what that returns."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.net = nn.ModuleDict({"all": nn.Sequential(self.encoder, self.classifier)})["all"]
        del self.encoder, self.classifier

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", batch[0].mean())
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_logits_are_found_as_in_training_and_logging_is_silent(taught, plain_trainer):
    torch.manual_seed(5)
    module = Submodule()
    path = taught(module, storage="float32")
    found = LogitsFile(path, "test").rows(torch.arange(24), torch.device("cpu"))
    assert torch.allclose(found, answer(module.net, Rows().x), atol=1e-6)


def test_taps_say_where_logits_are_and_how_the_model_runs(taught):
    module = trained()
    tapped = taught(module, storage="float32", folder="a", callbacks=[aux.Taps(logits="encoder.0")])
    forward = taught(
        module,
        storage="float32",
        folder="b",
        callbacks=[aux.Taps(forward=lambda module, batch: 2 * module(batch[0]))],
    )
    for path, expected in [
        (tapped, lambda x: module.encoder[0](x * torch.tensor([1.0, 1.0, 1.0, 0.01]))),
        (forward, lambda x: 2 * answer(module, x)),
    ]:
        found = LogitsFile(path, "test").rows(torch.arange(24), torch.device("cpu"))
        assert torch.allclose(found, expected(Rows().x), atol=1e-6)


class OfTheFit(L.LightningDataModule):
    """Has its data once it has been set up for training, and its own transfer of batches."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.dataset = Rows()

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, batch_size=7, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 3 * batch[0], batch[1]


class Mixing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x + torch.randn_like(x)), y)


def test_a_step_that_draws_random_numbers_is_warned_of(taught):
    with pytest.warns(UserWarning, match="draws random numbers also in evaluation mode"):
        taught(Mixing())


def test_a_datamodule_prepares_its_batches_as_in_training(taught):
    module = trained()
    path = taught(module, OfTheFit(), storage="float32")
    found = LogitsFile(path, "test").rows(torch.arange(24), torch.device("cpu"))
    assert torch.allclose(found, answer(module, 3 * Rows().x), atol=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_the_module_is_afterwards_as_it_was(mode, taught):
    module = trained().train(mode)
    before, attributes = weights(module), set(vars(module))
    taught(module)
    assert equal(weights(module), before)
    assert all(each.training is mode for each in module.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert not {"predict_step", "forward", "training_step"} & set(vars(module))
    assert set(vars(module)) - attributes <= {"_hparams"}  # of Lightning


def test_sequences_of_one_length_are_stored_and_read(taught, plain_trainer):
    class Tagger(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]).transpose(1, 2), batch[1])

    x, y = torch.randn(10, 6, WIDTH), torch.randint(CLASSES, (10, 6))
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    torch.manual_seed(5)
    module = Tagger()
    path = taught(module, loader, storage="float32")
    assert json.loads((path / "logits.json").read_text())["shape"] == [10, 6, CLASSES]
    probe = Probe(
        lambda step: torch.allclose(
            step.teacher("stored").logits, answer(module, step.batch[0]), atol=1e-6
        )
    )
    added = [aux.StoredTeacher(path), probe, aux.SelfDistillation("stored")]
    plain_trainer(callbacks=added).fit(Tagger(), loader)
    assert probe.seen == [True] * 3


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Rows())


class Flat(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).mean()


class Growing(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1 + index // 2, WIDTH), torch.tensor(0)


class Lengths(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).mean()


class Steep(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return 1e6 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "data", "how", "message"),
    [
        (Manual, None, {}, r"Manual\.training_step steps its optimizers itself.*Taps\(forward="),
        (Classifier, DataLoader(Endless()), {}, "Endless is iterable, and has no index"),
        (Classifier, [1, 2], {}, "the training dataloader is a list"),
        (Flat, None, {}, r"logits of shape \(10, 3\) for a batch of 5 samples"),
        (
            Lengths,
            DataLoader(Growing()),
            {},
            r"have the shape \(2, 3\), those before it \(1, 3\)",
        ),
        (Steep, None, {}, "do not fit into float16. Use storage='float32'"),
        (Classifier, None, {"storage": "top-k"}, "k=None and storage='top-k'"),
        (Classifier, None, {"k": 2}, "k=2 and storage='float16'"),
        (Classifier, None, {"storage": "top-k", "k": 3}, "k=3 of 3 classes leaves none out"),
        (Classifier, None, {"storage": "int8"}, "storage='int8' is unknown"),
        (Classifier, None, {"storage": "top-k", "k": 2, "dim": 4}, "no class dimension dim=4"),
    ],
)
def test_what_cannot_be_stored_is_a_named_error_and_leaves_no_file(
    module, data, how, message, taught, tmp_path
):
    before = set(tmp_path.iterdir())
    with pytest.raises(aux.AuxiliaryError, match=message):
        taught(module(), data, **how)
    assert set(tmp_path.iterdir()) == before


def test_what_is_there_is_never_overwritten(taught):
    path = taught()
    content = (path / "logits.npy").read_bytes()
    with pytest.raises(aux.AuxiliaryError, match="is there already"):
        taught(trained(6))
    assert (path / "logits.npy").read_bytes() == content


def test_an_interrupted_run_leaves_nothing_behind(taught, tmp_path):
    class Stops(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ValueError("stopped here")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="stopped here"):
        taught(Stops())
    assert not list(tmp_path.iterdir())


def test_a_run_over_a_part_of_the_dataset_is_not_taken_for_the_whole(plain_trainer, tmp_path):
    trainer = plain_trainer(limit_predict_batches=2)
    with pytest.raises(aux.AuxiliaryError, match=r"logits of 8 samples only, .* has 24"):
        teach(trainer, trained(), rows(), tmp_path / "logits")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ what is wrong
def fit(plain_trainer: Any, path: Path, data: Any = None, *objectives: Any, **how: Any) -> Any:
    added = [aux.StoredTeacher(path, **how), *(objectives or [aux.SelfDistillation("stored")])]
    trainer = plain_trainer(callbacks=added)
    trainer.fit(Classifier(), rows() if data is None else data)
    return trainer


class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "logits.json").unlink(), "is not a folder of stored logits"),
        (lambda path: (path / "logits.npy").unlink(), "is damaged: FileNotFoundError"),
        (
            lambda path: (path / "logits.npy").write_bytes((path / "logits.npy").read_bytes()[:-8]),
            "is damaged: ValueError",
        ),
        (lambda path: (path / "logits.json").write_text("{"), "is damaged: JSONDecodeError"),
        (
            lambda path: numpy.save(path / "logits.npy", numpy.zeros((2, 2))),
            r"logits\.npy holds float64 of shape \(2, 2\)",
        ),
        (
            lambda path: (path / "logits.json").write_text('{"version": 2}'),
            "version 2, not 1",
        ),
    ],
)
def test_missing_and_damaged_files_are_found_before_training(
    damage, message, taught, plain_trainer
):
    path = taught()
    damage(path)
    with pytest.raises(aux.AuxiliaryError, match=f"stored: .*{message}"):
        plain_trainer(callbacks=[aux.StoredTeacher(path)]).fit(Never(), rows())


def test_a_dataset_of_another_length_is_refused_before_training(taught, plain_trainer):
    path = taught()
    for size, how, message in [
        (20, {}, "holds logits of 24 samples, and the training dataset has 20.*check=False"),
        (28, {}, "holds logits of 24 samples, and the training dataset has 28"),
        (28, {"check": False}, "holds logits of 24 samples, and the training dataset has 28"),
    ]:
        with pytest.raises(aux.AuxiliaryError, match=message):
            plain_trainer(callbacks=[aux.StoredTeacher(path, **how)]).fit(Never(), rows(size))
    assert fit(plain_trainer, path, rows(20), check=False).global_step == 5


class Turned(Rows):
    """The same samples in another order."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return super().__getitem__(len(self) - 1 - index)


def test_a_dataset_in_another_order_is_refused_in_the_first_step(taught, plain_trainer):
    path, data = taught(), DataLoader(Turned(), batch_size=24)
    with pytest.raises(aux.AuxiliaryError, match=r"stored: sample \d+ .* has another target than"):
        fit(plain_trainer, path, data)
    assert fit(plain_trainer, path, data, check=False).global_step == 1


def test_other_classes_and_data_without_an_index_are_named_errors(taught, plain_trainer):
    class Ten(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 10)

    path = taught(Ten())
    with pytest.raises(aux.AuxiliaryError, match=r"self_distillation: .*\(4, 3\) and \(4, 10\)"):
        fit(plain_trainer, path)
    with pytest.raises(aux.AuxiliaryError, match=r"stored .*Endless is iterable and has no index"):
        fit(plain_trainer, path, DataLoader(Endless(), batch_size=4))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            lambda: aux.SelfDistillation("stored", on="encoder", divergence="mse"),
            "self_distillation wants the output of 'encoder' of the teacher 'stored', of which",
        ),
        (
            lambda: Probe(lambda step: step.teacher("stored").features("encoder")),
            "probe wants features of the teacher 'stored', of which only the logits are stored",
        ),
        (lambda: Probe(lambda step: step.teacher("stored").input()), "probe wants the input of"),
        (lambda: aux.EMAAnchor("weight", teacher="stored"), "is another model, or its logits"),
    ],
)
def test_more_than_logits_is_a_named_error(objective, message, taught, plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=message):
        fit(plain_trainer, taught(), None, objective())


def test_a_resumed_run_wants_the_same_logits(taught, plain_trainer, tmp_path):
    first, other = taught(folder="a"), taught(trained(6), folder="b")
    trainer = fit(plain_trainer, first)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for path, message in [(other, "does not hold the logits of the run"), (first, None)]:
        again = plain_trainer(max_epochs=2, callbacks=[aux.StoredTeacher(path)])
        if message:
            with pytest.raises(aux.AuxiliaryError, match=message):
                again.fit(Classifier(), rows(), ckpt_path=tmp_path / "run.ckpt")
        else:
            again.fit(Classifier(), rows(), ckpt_path=tmp_path / "run.ckpt")
            assert again.global_step == 12
