"""Averages in host memory: moved beside the training, waited for by readers, the same values.

Where there is no second device, `Late` stands in for one: what it has been told to copy it reads as
late as it may, so that a write that does not wait for it ends in the average.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_aux as aux
from lightning_aux.weights import WeightStore, offload
from lightning_aux.weights.offload import before_writing
from tests.averages.test_ema_weights import Watched, parameters
from tests.engine.small_models import Blind, Classifier, equal, rows, weights
from tests.gpu import training as scaled


class Late:
    """Copies that are done when somebody is about to write, or else a while after all else."""

    def __init__(self, device: torch.device) -> None:
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.asked: list[tuple[list[Tensor], list[Tensor]]] = []

    def start(self, staging: list[Tensor], values: list[Tensor]) -> None:
        self.done.clear()
        self.asked.append((staging, values))

    def before_writing(self) -> None:
        with self.lock:
            while self.asked:
                torch._foreach_copy_(*self.asked.pop())
        self.done.set()

    def wait(self) -> None:
        self.done.wait(0.3)
        self.before_writing()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "copies_from", Late)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Updates wait until it is set."""
    opened, move = threading.Event(), offload.move_

    def gated(*args: Any) -> None:
        opened.wait()
        move(*args)

    monkeypatch.setattr(offload, "move_", gated)
    return opened


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if "lightning_aux" in each.name]


def network() -> nn.Module:
    """Half precision, a frozen layer, and parameters that are not contiguous."""
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6).bfloat16(), nn.Conv2d(3, 4, 2))
    module[2].to(memory_format=torch.channels_last)
    return module.append(nn.BatchNorm1d(6)).append(nn.Linear(2, 2).requires_grad_(False))


def same(one: WeightStore, other: WeightStore) -> bool:
    return equal(one.state_dict(), other.state_dict())


def shake(module: nn.Module) -> None:
    with torch.no_grad():
        for each in module.parameters():
            each.add_(torch.randn_like(each))


# ------------------------------------------------------------------------------------- the store
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_values_are_those_without_it_to_the_last_bit(buffers: Any) -> None:
    module = network()
    here, there = WeightStore(module, buffers), WeightStore(module, buffers, offload=True)
    for step in range(50):
        shake(module)
        for each in (here, there):
            each.update(0.9 if step else 0.0)
            each.update_buffers(0.9)
        if step % 7 == 0:
            assert same(here, there)
        if step == 20:  # an adapter
            module.append(nn.Linear(3, 3))
    assert same(here, there)
    assert all(each.device.type == "cpu" for each in there.values())
    there.close()


def test_training_goes_on_beside_the_update_and_does_not_change_it(gate: threading.Event) -> None:
    module = network()
    store = WeightStore(module, offload=True)
    expected = WeightStore(module)
    for each in (store, expected):
        shake(module) if each is store else None
        each.update(0.5)
    assert store._offload is not None
    assert not store._offload._moving.done()  # type: ignore[union-attr]
    shake(module)  # the next step of the optimizer
    store.update_buffers(0.5)  # before it nobody waits either
    store.follow()
    assert not store._offload._moving.done()  # type: ignore[union-attr]
    gate.set()
    assert same(store, expected)
    store.close()


READERS: dict[str, Callable[[WeightStore, nn.Module], list[Tensor]]] = {
    "values": lambda store, module: store.values(),
    "parts": lambda store, module: store.parts(),
    "pairs": lambda store, module: store.pairs()[1],
    "state_dict": lambda store, module: [*store.state_dict().values()],
    "in_place": lambda store, module: within(store, module),
    "give": lambda store, module: given(store, module),
    "mean_of": lambda store, module: mean_of(store, module),
    "load_state_dict": lambda store, module: loaded(store, module),
    "update": lambda store, module: updated(store, module),
}


def within(store: WeightStore, module: nn.Module) -> list[Tensor]:
    with store.in_place():
        return [each.detach().clone() for each in module.parameters()]


def given(store: WeightStore, module: nn.Module) -> list[Tensor]:
    store.give()
    return [each.detach().clone() for each in module.parameters()]


def mean_of(store: WeightStore, module: nn.Module) -> list[Tensor]:
    mean = WeightStore(module)
    mean.mean_of([store, store])
    return mean.values()


def loaded(store: WeightStore, module: nn.Module) -> list[Tensor]:
    """What is loaded is not overwritten by an update from before."""
    store.load_state_dict({name: each * 0 + 3 for name, each in module.state_dict().items()}, "x")
    return [each.clone() for each in store.values()]


def updated(store: WeightStore, module: nn.Module) -> list[Tensor]:
    """The staging memory of the one before is not written to meanwhile."""
    torch.manual_seed(6)
    shake(module)
    store.update(0.5)
    return store.values()


@pytest.mark.parametrize("read", READERS)
def test_whoever_reads_it_waits_for_the_update(gate: threading.Event, read: str) -> None:
    module = nn.Linear(4, 4)
    here, there = WeightStore(module), WeightStore(module, offload=True)
    shake(module)
    copy = deepcopy(module)
    here.update(0.5)
    there.update(0.5)
    threading.Timer(0.05, gate.set).start()
    found = [each.clone() for each in READERS[read](there, module)]
    module.load_state_dict(copy.state_dict())
    expected = READERS[read](here, module)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    there.close()


def test_an_error_in_the_update_is_raised_by_every_reader_and_not_by_the_end(monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("no room")

    module = nn.Linear(4, 4)
    store = WeightStore(module, offload=True)
    monkeypatch.setattr(offload, "move_", fails)
    store.update(0.5)
    for read in READERS.values():
        with pytest.raises(aux.AuxiliaryError, match=r"offload=True.*MemoryError: no room"):
            read(store, module)
    store.close()
    with pytest.raises(aux.AuxiliaryError, match="no room"):
        store.state_dict()
    assert threads() == []


def test_ctrl_c_while_waiting_loses_no_update(gate: threading.Event) -> None:
    module = nn.Linear(4, 4)
    here, there = WeightStore(module), WeightStore(module, offload=True)
    shake(module)
    here.update(0.5)
    there.update(0.5)
    moving = there._offload._moving  # type: ignore[union-attr]
    result = moving.result

    def interrupted() -> None:
        moving.result = result
        raise KeyboardInterrupt

    moving.result = interrupted
    with pytest.raises(KeyboardInterrupt):
        there.values()
    gate.set()
    there.close()
    assert same(here, there)


def test_it_works_on_after_it_is_closed_and_one_that_is_forgotten_leaves_nothing(late) -> None:
    module = nn.Linear(4, 4)
    here, there = WeightStore(module), WeightStore(module, offload=True)
    for _ in range(3):
        shake(module)
        here.update(0.5)
        there.update(0.5)
        before_writing()
        there.close()
        assert (threads(), offload._PARTS, offload._HOOKS) == ([], {}, [])
    assert same(here, there)
    there.update(0.5)
    assert offload._PARTS
    del there
    gc.collect()
    assert (offload._PARTS, offload._HOOKS) == ({}, [])


# --------------------------------------------------------------------------- who writes meanwhile
def train(module: nn.Module, between: Callable[[], None], offloads: bool) -> WeightStore:
    """Ten steps, an update after each, and then ``between``."""
    store = WeightStore(module, offload=offloads)
    optimizer = torch.optim.SGD([e for e in module.parameters() if e.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(5)
    try:
        for _ in range(10):
            for each in module.parameters():
                if each.requires_grad:
                    each.grad = torch.randn(each.shape, generator=generator)
            optimizer.step()
            store.update(0.5)
            between()
        return store
    finally:
        store.close()


def both(make: Callable[[], nn.Module], between: Callable[[nn.Module], None]) -> bool:
    stores = []
    for offloads in (False, True):
        torch.manual_seed(4)
        module = make()
        stores.append(train(module, lambda: between(module), offloads))  # noqa: B023
    return same(*stores)


def test_the_next_step_of_the_optimizer_waits_for_the_copies(late) -> None:
    assert both(lambda: nn.Linear(4, 4), lambda module: None)


class Watching(Classifier):
    """Whether the copies of the step before are still under way, in each forward and write."""

    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.forwards: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.forwards.append(any(part._read for parts in offload._PARTS.values() for part in parts))
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        return self.optimizers().step()


@pytest.mark.parametrize("manual", [False, True])
def test_the_copies_run_beside_the_next_forward(plain_trainer, late, manual) -> None:
    """Lightning runs it in a closure, within the optimizer's step."""
    module = Watching(manual)
    plain_trainer(callbacks=[aux.EMAWeights(0.9, offload=True)]).fit(module, rows())
    assert module.forwards == [False, True, True, True, True, True]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("by_name", [False, True])
def test_an_optimizer_writes_when_its_closure_has_run(late, kind, by_name) -> None:
    stores = []
    for offloads in (False, True):
        torch.manual_seed(4)
        module = nn.Linear(4, 1)
        optimizer, x = kind(module.parameters(), lr=0.1), torch.randn(8, 4)

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = module(x).square().mean()  # noqa: B023
            loss.backward()
            return loss

        store = WeightStore(module, offload=offloads)
        for _ in range(5):
            optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            store.update(0.5)
        stores.append(store)
        store.close()
    assert same(*stores)


def test_a_frozen_target_network_that_the_user_moves_is_copied_in_order(late) -> None:
    def towards(module: Any) -> None:
        for online, target in zip(module[0].parameters(), module[1].parameters(), strict=True):
            target.data.lerp_(online.data, 0.1)

    def pair() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))

    assert both(pair, towards)


def test_weights_that_the_user_points_elsewhere_are_averaged_as_they_were(late) -> None:
    def clipped(module: nn.Module) -> None:
        for each in module.parameters():
            each.data = each.data.clamp(-0.1, 0.1)

    assert both(lambda: nn.Linear(4, 4), clipped)


def test_weights_that_the_user_writes_to_meanwhile_are_a_named_error(late) -> None:
    def clipped(module: nn.Module) -> None:
        with torch.no_grad():
            for each in module.parameters():
                each.clamp_(-0.1, 0.1)

    with pytest.raises(aux.AuxiliaryError, match=r"written to between two steps.*offload=True"):
        both(lambda: nn.Linear(4, 4), clipped)


def test_weights_that_another_store_gives_wait_for_the_copies(late) -> None:
    torch.manual_seed(4)
    initial = nn.Linear(4, 4)

    def again(module: nn.Module) -> None:
        store = WeightStore(module)
        store.load_state_dict(initial.state_dict(), "initial")
        store.give()
        store.close()

    assert both(lambda: nn.Linear(4, 4), again)


# --------------------------------------------------------------------------------- in a training
def variational() -> list[Any]:
    return [aux.ParameterAnchor(form="variational", weight=0.1)]


MEMBERS: dict[str, Callable[[bool], list[Any]]] = {
    "every step": lambda on: [aux.EMATeacher(0.9, offload=on)],
    "every third": lambda on: [aux.EMATeacher(0.9, every=3, offload=on)],
    "averaged buffers": lambda on: [aux.EMATeacher(0.9, buffers="average", offload=on)],
    "from a start": lambda on: [aux.EMATeacher(0.9, start=4, offload=on)],
    "power function": lambda on: [aux.EMATeacher(length=0.1, offload=on)],
    "look-ahead": lambda on: [aux.EMATeacher(0.9, lookahead=2, offload=on)],
    "equal": lambda on: [aux.SWATeacher("ema", start=2, every=3, offload=on)],
    "window": lambda on: [aux.SnapshotTeacher("ema", every=2, window=3, offload=on)],
    "generations": lambda on: [
        aux.SnapshotTeacher("ema", every=5, restart=True, offload=on),
        aux.EMATeacher(0.9, "other", offload=on),
    ],
    "beside noise": lambda on: [aux.EMATeacher(0.9, offload=on), *variational()],
}


def fitted(plain_trainer: Any, added: list[Any], **how: Any) -> tuple[Any, list[Any]]:
    """The module and the states of what was added, after two epochs of six steps."""
    L.seed_everything(7, verbose=False)
    module = Watched()
    trainer = plain_trainer(max_epochs=2, callbacks=[*added, aux.EMAWeights(teacher="ema")])
    trainer.fit(module, rows(), rows(8), **how)
    return module, [each.state() for each in added]


def identical(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)


@pytest.mark.parametrize("reads", ["at once", "late"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_training_is_the_same_with_it(plain_trainer, monkeypatch, name, reads) -> None:
    """Weights, averages, and what every evaluation has seen."""
    learns = []  # who asks the teacher in every step waits for it
    if reads == "late":
        monkeypatch.setattr(offload, "copies_from", Late)
    else:
        learns.append(aux.SelfDistillation("ema"))
    runs = [fitted(plain_trainer, [*MEMBERS[name](on), *learns]) for on in (False, True)]
    (plain, states), (module, others) = runs
    assert equal(weights(plain), weights(module))
    assert identical(states, others)
    assert len(plain.seen) == len(module.seen) == 12
    assert all(
        where == there and equal(one, other)
        for (where, one), (there, other) in zip(plain.seen, module.seen, strict=True)
    )
    assert (threads(), offload._PARTS, offload._HOOKS) == ([], {}, [])


def test_a_virtual_step_that_a_scaler_skips_is_undone_when_the_copies_are_made(late) -> None:
    """Steps are taken in turn: virtual, real, virtual and too large, real."""
    runs = []
    for on in (False, True):
        teacher, module = aux.EMATeacher(0.9, lookahead=1, offload=on), scaled.new(overflows=(2,))
        scaled.fit(module, "cpu", [teacher], precision="16-mixed", max_epochs=1)
        runs.append([weights(module), teacher.state()])
    assert identical(*runs)
    assert runs[0][1]["updates"] == 5


def test_ema_weights_has_it_too_and_a_named_teacher_its_own(plain_trainer) -> None:
    runs = []
    for on in (False, True):
        L.seed_everything(7, verbose=False)
        module, average = Watched(), aux.EMAWeights(0.9, offload=on)
        plain_trainer(max_epochs=2, callbacks=[average]).fit(module, rows(), rows(8))
        runs.append((module.seen, average.own_teacher.state()))  # type: ignore[union-attr]
    assert identical(*runs)
    with pytest.raises(aux.AuxiliaryError, match=r"offload=True beside teacher='ema'"):
        aux.EMAWeights(teacher="ema", offload=True)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_run_is_resumed_with_it_or_without_it(plain_trainer, tmp_path, first, second) -> None:
    """Saved right after an update; evaluated from the file, too."""
    path = tmp_path / "half.ckpt"

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(path)

    def run(on: bool, *more: L.Callback, **how: Any) -> Any:
        L.seed_everything(7, verbose=False)
        module, average = Watched(), aux.EMAWeights(0.9, every=2, offload=on)
        trainer = plain_trainer(max_epochs=2, callbacks=[average, *more], num_sanity_val_steps=0)
        trainer.fit(module, rows(), rows(8), **how)
        averages = average.own_teacher.state()["weights"]  # type: ignore[union-attr]
        return parameters(module), averages

    (trained, averages), (resumed, again) = run(first, Saves()), run(second, ckpt_path=path)
    assert equal(trained, resumed)
    assert identical([averages[name] for name in trained], [again[name] for name in trained])
    fresh = Watched()
    trainer = plain_trainer(callbacks=[aux.EMAWeights(0.9, every=2, offload=second)])
    trainer.validate(fresh, rows(8), ckpt_path=path, verbose=False)
    held = torch.load(path, weights_only=True)["lightning_aux"]["members"]
    average = held["ema_weights.teacher"]["weights"]
    assert all(torch.equal(fresh.seen[-1][1][name], average[name]) for name in trained)


class Breaks(L.Callback):
    """Raises after the fourth batch, with an update under way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("theirs"), KeyboardInterrupt()], ids=repr)
def test_a_training_that_ends_in_between_leaves_no_thread_and_its_own_weights(
    plain_trainer, late, error
) -> None:
    module, average = Watched(), aux.EMAWeights(0.9, offload=True)
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        plain_trainer(callbacks=[average, Breaks(error)]).fit(module, rows(), rows(8))
    assert (threads(), offload._PARTS, offload._HOOKS) == ([], {}, [])
    assert equal(parameters(module), module.history[-1])
    state = average.own_teacher.state()  # type: ignore[union-attr]
    assert state["updates"] == 4


def test_an_update_that_fails_ends_the_training_by_name(plain_trainer, monkeypatch) -> None:
    calls: list[None] = []
    move = offload.move_

    def fails(*args: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError("no room")
        move(*args)

    monkeypatch.setattr(offload, "move_", fails)
    module = Watched()
    trainer = plain_trainer(callbacks=[aux.EMAWeights(0.9, offload=True)])
    with pytest.raises(aux.AuxiliaryError, match=r"offload=True.*MemoryError: no room.*checkpoint"):
        trainer.fit(module, rows(), rows(8))
    assert len(module.history) == 1 + 4  # the update after it asks
    assert threads() == []
    assert equal(parameters(module), module.history[-1])


def test_no_step_waits_for_an_update(plain_trainer, gate) -> None:
    """The first of them, after two steps, is let go after the third."""
    seen: list[bool] = []

    class Opens(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step in (2, 3):
                seen.append(teacher.store._offload._moving.done())  # type: ignore[union-attr]
            if trainer.global_step == 3:
                gate.set()

    teacher = aux.EMATeacher(0.5, every=2, offload=True)
    looks = Blind(lambda step: None)
    plain_trainer(callbacks=[teacher, looks, Opens()]).fit(Classifier(), rows())
    assert seen == [False, False]
    assert teacher.updates == 3
