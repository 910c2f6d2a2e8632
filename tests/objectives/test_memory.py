"""The memory per sample: that of a computation by hand, on any number of processes, in the space
that it announced."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_aux as aux
from lightning_aux.objectives import memory as module_of_memory
from lightning_aux.objectives.memory import SampleMemory
from lightning_aux.objectives.row_storage import Top, decoded
from tests.engine.small_models import Classifier, Rows
from tests.objectives import memory_in_two_processes as two
from tests.objectives.remembering import CLASSES, ByHand, Now, engine, half, peak, stored
from tests.two_processes import run_script

EPOCHS = {"padded": 3, "weighted": 3, "saved": 1}
EXACT = [str(each) for each in two.STORAGES]
RESUMED = [f"resumed {each}" for each in two.STORAGES]
every_storage = pytest.mark.parametrize("storage", two.STORAGES)


# ------------------------------------------------------------------------ two processes are one
@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What both processes wrote in a job."""
    folder = tmp_path_factory.mktemp("memory")
    _, trainer, _ = two.trained(0, epochs=1, devices=1)
    trainer.save_checkpoint(folder / "one.ckpt")
    run_script(two.__file__, folder, timeout=300)

    def read(job: str) -> list[dict[str, Any]]:
        found = [torch.load(folder / f"{job}.{each}.pt") for each in (0, 1)]
        for each in found:
            assert "error" not in each, each["error"]
        return found

    read.folder = folder  # type: ignore[attr-defined]
    return read


def replayed(by_hand: ByHand, visited: Sequence[Any], epochs: int) -> list[list[Any]]:
    """What is read by each process in every batch, of windows that end with an epoch."""
    batches = len(visited[0]) // epochs
    read: list[list[Any]] = []
    for first in range(0, len(visited[0]), batches):
        for start in range(first, first + batches, two.WINDOW):
            places = range(start, min(start + two.WINDOW, first + batches))
            read += by_hand.step([[samples[place] for samples in visited] for place in places])
    return [list(each) for each in zip(*read, strict=True)]


def summed(parts: Sequence[dict[str, Any]], what: str) -> Tensor:
    """The sum over the processes of what each holds, zero where it holds nothing."""
    size = sum(len(each[what]) for each in parts)
    total = torch.zeros(size, *parts[0][what].shape[1:])
    for rank, each in enumerate(parts):
        own = torch.zeros_like(total)
        own[rank :: len(parts)] = each[what]
        total += own
    return total


def check_against(by_hand: ByHand, parts: Sequence[dict[str, Any]], epochs: int) -> None:
    read = replayed(by_hand, [each["visited"] for each in parts], epochs)
    for each, expected in zip(parts, read, strict=True):
        for rows, by_list in zip(each["read"], expected, strict=True):
            assert torch.equal(rows, torch.tensor(by_list).reshape(-1, CLASSES))
    assert torch.equal(summed(parts, "rows"), torch.tensor(by_hand.rows))
    assert summed(parts, "seen").tolist() == by_hand.seen


@pytest.mark.parametrize("job", [*EXACT, "padded", "weighted", "saved", "twice"])
def test_what_two_processes_hold_adds_up_to_the_memory_of_one(ended: Any, job: str) -> None:
    """To the last bit, and so is what they read: batches of unequal sizes and of none, samples that
    both have in one window, padded ones, a sampler with replacement, two calls of fit."""
    parts = ended(job)
    by_hand = ByHand(two.SIZE, {"float16": "float16", "2": 2}.get(job, "float32"))
    check_against(by_hand, parts, EPOCHS.get(job, 2))
    assert [len(each["rows"]) for each in parts] == [6, 5]
    first, second = ({one for batch in each["visited"] for one in batch} for each in parts)
    assert first & second  # samples that wander


@pytest.mark.parametrize("job", EXACT)
def test_only_the_first_process_holds_the_whole_memory_and_only_in_what_it_saves(
    ended: Any, job: str
) -> None:
    first, second = ended(job)
    saved, part = first["state"]["memory"], second["state"]["memory"]
    assert saved["of"] == part["of"] == [two.SIZE, CLASSES]
    assert "part" not in saved
    assert part["part"] == [1, 2]
    for name, each in saved.items():
        if isinstance(each, Tensor):
            assert len(each) == two.SIZE
            assert torch.equal(each[1::2], part[name])
    if "rows" in saved:
        assert torch.equal(saved["rows"].float(), summed([first, second], "rows"))
    assert saved["seen"].tolist() == summed([first, second], "seen").bool().tolist()


def one_epoch_by_hand(processes: int) -> ByHand:
    by_hand = ByHand(two.SIZE)
    replayed(by_hand, [two.lists(rank) for rank in range(processes)], 1)
    by_hand.number = 0  # a new objective counts anew
    return by_hand


@every_storage
def test_two_processes_go_on_with_the_memory_of_one(ended: Any, storage: Any) -> None:
    """Also in another storage than it was saved in."""
    by_hand = one_epoch_by_hand(1)
    by_hand.storage = storage
    by_hand.rows = [stored(row, storage) for row in by_hand.rows]
    check_against(by_hand, ended(f"resumed {storage}"), 1)


def test_two_processes_go_on_with_the_memory_of_two(ended: Any) -> None:
    check_against(one_epoch_by_hand(2), ended("resumed by as many"), 1)


def test_one_process_goes_on_with_the_memory_of_two(ended: Any) -> None:
    ended("saved")
    visits, *_ = two.trained(0, devices=1, ckpt_path=ended.folder / "two.ckpt")
    check_against(one_epoch_by_hand(2), [two.noted(visits)], 1)


@pytest.mark.parametrize("processes", [1, 3, 4, 13])
def test_a_saved_memory_is_dealt_out_to_any_number_of_processes(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirteen: some hold nothing."""
    rows = torch.rand(two.SIZE, CLASSES)
    state = {"seen": rows[:, 0] > 0.5, "rows": rows, "of": [two.SIZE, CLASSES]}
    monkeypatch.setattr(module_of_memory, "processes", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(module_of_memory, "rank", lambda rank=rank: rank)
        memory = SampleMemory()
        memory.begin(engine(), "memory", state)
        parts.append({"rows": memory.rows, "seen": memory.seen})
    assert torch.equal(summed(parts, "rows"), rows)
    assert torch.equal(summed(parts, "seen").bool(), state["seen"])


def test_a_term_that_fails_on_one_process_leaves_no_other_waiting(ended: Any) -> None:
    """It fails in the first step, before it has read, and the others go on for some steps."""
    first, second = ended("failing")
    assert "could not be computed on process 1" in first["raised"]
    assert second["raised"] == "RuntimeError: a mistake of the second process"
    assert first["steps"] == second["steps"] == two.LAG


def test_a_process_that_wrote_nothing_leaves_what_the_other_wrote(ended: Any) -> None:
    """As after a step that a gradient scaler has skipped."""
    for each in ended("one writes"):
        (first, unseen), *later = each["read"]
        assert not first.any()
        assert not any(unseen)
        for rows, seen in later:
            assert rows.tolist() == [[5.0, 6.0], [3.0, 4.0], [5.0, 6.0]]
            assert seen == [True] * 3


def test_processes_with_different_datasets_are_a_named_error_on_each(ended: Any) -> None:
    for each in ended("other data"):
        assert "the processes have memories of (8, 4) and (9, 4) rows" in each["raised"]


def test_under_fsdp2_the_parts_add_up_too(ended: Any) -> None:
    """Row i holds the number of its visits, and i."""
    parts = ended("sharded")
    rows, size = summed(parts, "rows"), parts[0]["size"]
    visits = [0] * size
    for each in parts:
        for samples in each["visited"]:
            for sample in samples:
                visits[sample] += 1
    assert rows[:, 0].tolist() == visits
    assert set(visits) == {2}  # epochs
    assert rows[:, 1].tolist() == list(range(size))


# ------------------------------------------------------------------------------------ one process
@every_storage
def test_the_memory_of_one_process_is_that_of_the_computation_by_hand(storage: Any) -> None:
    """Samples that come twice in a batch and in a window; batches of none."""
    visits, *_ = two.trained(0, storage=storage, devices=1)
    check_against(ByHand(two.SIZE, storage), [two.noted(visits)], 2)
    assert any(len(set(samples)) < len(samples) for samples in visits.visited)


def test_a_row_of_zeros_that_was_written_is_told_from_one_that_never_was() -> None:
    memory = SampleMemory(2)
    memory.begin(engine(), "memory", None)
    now: Any = Now(torch.tensor([1, 3]), 4)
    rows, seen = memory.read(now, 3)
    assert not rows.any()
    assert seen.tolist() == [False, False]
    memory.write(now, torch.zeros(2, 3))
    assert not memory.seen.any()  # before the optimizer has stepped
    now.waiting[0]()
    rows, seen = memory.read(Now(torch.tensor([3, 0, 1]), 4), 3)  # type: ignore[arg-type]
    assert not rows.any()
    assert seen.tolist() == [True, False, True]


@every_storage
def test_on_one_process_the_host_never_waits_for_the_device(storage: Any) -> None:
    """Tensors on the meta device have no values that could be asked for."""
    memory = SampleMemory(storage)
    memory.begin(engine("meta"), "memory", None)
    for _ in range(2):
        now: Any = Now(torch.zeros(6, dtype=torch.int64, device="meta"), 40)
        rows, seen = memory.read(now, 5)
        assert rows.device.type == seen.device.type == "meta"
        memory.write(now, rows)
        now.waiting[0]()
        memory.settle()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(seen.any())  # which does ask


# ---------------------------------------------------------------------------------------- storage
def test_the_sum_of_a_row_survives_whatever_is_left_out_of_it() -> None:
    rows = torch.rand(200, 50, generator=torch.Generator().manual_seed(1)).softmax(-1)
    rows[100:] *= 0.3
    again = decoded(Top(5).encoded(rows), 50)
    torch.testing.assert_close(again.sum(-1), rows.sum(-1), atol=0, rtol=1e-6)
    for before, after in zip(rows.tolist(), again.tolist(), strict=True):
        assert after == pytest.approx(stored(before, 5), abs=1e-7)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_classes_are_kept_in_the_smallest_integers_that_fit(classes: int, dtype: Any) -> None:
    rows = torch.zeros(2, classes)
    rows[:, [0, classes - 1]] = torch.tensor([0.25, 0.75])
    kept = Top(2).encoded(rows)
    assert kept["classes"].dtype == dtype
    assert torch.equal(decoded(kept, classes), rows)


def test_more_entries_than_there_are_classes_are_all_of_them_in_float16() -> None:
    rows = torch.rand(4, 3)
    again = decoded(Top(5).encoded(rows), 3)
    assert again.tolist() == [[half(each) for each in row] for row in rows.tolist()]


@pytest.mark.parametrize("storage", ["float64", "top", "top-0", "-3", 0, True, 2.5, None])
def test_a_storage_that_there_is_none_of_is_refused(storage: Any) -> None:
    with pytest.raises(aux.AuxiliaryError, match=f"elr: storage={storage!r} is unknown"):
        aux.EarlyLearningRegularization(storage=storage, name="elr")


@pytest.mark.parametrize("storage", [3, "3", "top-3"])
def test_a_number_of_entries_may_be_written_in_three_ways(storage: Any) -> None:
    assert SampleMemory(storage)._storage == Top(3)


def test_a_checkpoint_of_before_there_was_a_choice_is_read(
    plain_trainer: Any, tmp_path: Path
) -> None:
    """It held one float32 tensor and called it targets."""
    kept = [aux.EarlyLearningRegularization(), aux.EarlyLearningRegularization()]
    loader = DataLoader(Rows(24), batch_size=4, sampler=range(8))
    trainer = plain_trainer(callbacks=[kept[0]])
    trainer.fit(Classifier(), loader)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt")
    entry = checkpoint["lightning_aux"]["members"]["early_learning_regularization"]
    entry["targets"] = entry.pop("memory")["rows"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for each, name in zip(kept, ("new", "old"), strict=True):
        plain_trainer(max_epochs=2, callbacks=[each]).fit(
            Classifier(), loader, ckpt_path=tmp_path / f"{name}.ckpt"
        )
    assert torch.equal(kept[0].memory.rows, kept[1].memory.rows)
    assert kept[1].memory.seen.tolist() == [True] * 8 + [False] * 16


# ---------------------------------------------------------------------------------- what it costs
@pytest.mark.parametrize(
    ("storage", "samples", "classes", "each"),
    # Bytes of one sample: whether it was seen; and values, or values, classes and a sum.
    [
        ("top-5", 1_000_000, 1000, 1 + 2 * 5 + 2 * 5 + 4),
        ("float16", 20_000, 500, 1 + 2 * 500),
        ("float32", 20_000, 200, 1 + 4 * 200),
        (300, 20_000, 500, 1 + 2 * 300 + 2 * 300 + 4),
    ],
)
def test_no_more_is_allocated_than_was_announced(
    storage: Any, samples: int, classes: int, each: int
) -> None:
    """Steps of two micro-batches and what is saved; not what the objective itself computes."""
    batch, window = 256, 2
    told = engine(accumulate=window)
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(batch, classes, generator=draw)

    def act() -> Any:
        memory = SampleMemory(storage)
        memory.begin(told, "memory", None)
        for _ in range(3):
            waiting: list[Any] = []
            for _ in range(window):
                now: Any = Now(torch.randint(samples, (batch,), generator=draw), samples)
                memory.read(now, classes)
                memory.write(now, values)
                waiting += now.waiting
            for each in waiting:
                each()
            del waiting, now
            memory.settle()
        return memory, memory.state()

    used = peak(act)
    (said,) = told.said
    assert said.startswith(f"memory of memory = {samples:,} samples x {classes:,} classes, ")
    held, work = (float(found) * 2**20 for found in re.findall(r"([\d.]+) MiB", said))
    assert held == pytest.approx(samples * each, abs=0.1 * 2**20)
    assert samples * each <= used <= held + work


def test_no_process_allocates_more_than_was_announced(ended: Any) -> None:
    """And only the first more than its part, where it saves."""
    first, second = ended("size")
    assert second["said"] == first["said"]  # it is the engine that has the first process speak
    (said,) = first["said"]
    assert "on each of 2 processes" in said
    held, work, saving = (float(found) * 2**20 for found in re.findall(r"([\d.]+) MiB", said))
    assert held == pytest.approx(100_001 * 25, abs=0.1 * 2**20)
    for each in (first, second):
        assert each["training"] <= held + work
    assert 200_001 * 25 <= first["saving"] <= saving
    assert second["saving"] < 2**16


def test_the_size_is_said_once_and_before_anything_is_held(
    plain_trainer: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        elr = aux.EarlyLearningRegularization(storage="top-2")
        plain_trainer(max_epochs=2, callbacks=[elr]).fit(
            Classifier(), DataLoader(Rows(24), batch_size=4)
        )
    lines = [each for each in caplog.messages if "memory of" in each]
    assert lines == [
        "lightning_aux: memory of early_learning_regularization = 24 samples x 3 classes, top-2 in "
        "float16 with classes in uint8: 0.1 MiB and 0.1 MiB while a batch of 4 is in work"
    ]


def test_loading_copies_what_it_keeps() -> None:
    """A checkpoint may be a mapped file that is about to be replaced."""
    saved = torch.rand(8, 3)
    state = {"seen": torch.ones(8, dtype=torch.bool), "rows": saved, "of": [8, 3]}
    memory = SampleMemory()
    memory.begin(engine(), "memory", state)
    assert torch.equal(memory.rows, saved)
    assert memory.rows.data_ptr() != saved.data_ptr()
