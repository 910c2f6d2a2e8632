"""What can only be seen on a GPU, as plain functions: each asserts, and returns what it measured.

A check takes the device, `"cuda"` or `"cpu"`; on the CPU it does what exists there, so that its
logic runs everywhere, and raises `Skip` where nothing does.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_aux as aux
from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.finite import LAG
from lightning_aux.registry import ENTRIES
from lightning_aux.weights import WeightStore
from tests.gpu.training import (
    OVERFLOWS,
    SCALE,
    STEPS,
    ByBatch,
    Shrink,
    Sorted,
    apart,
    attached,
    by_hand,
    everything,
    fit,
    new,
    weights,
)


class Skip(Exception):
    """The device has nothing to check here."""


CHECKS: list[Callable[[str], str]] = []


def check(function: Callable[[str], str]) -> Callable[[str], str]:
    CHECKS.append(function)
    return function


# ---------------------------------------------------------------------------------- precision
def _against_the_loop(device: str, precision: str, tolerance: float, **model: Any) -> str:
    how: dict[str, Any] = {
        "32-true": {},
        "bf16-mixed": {"autocast": torch.bfloat16},
        "bf16-true": {"dtype": torch.bfloat16},
        "16-mixed": {"autocast": torch.float16},
    }[precision]
    actual, head = attached(device, precision, **model)
    expected = by_hand(device, head.first, **how, **model)
    without = by_hand(device, None, **how, **model)
    assert actual.keys() == expected.keys()
    difference, effect = apart(actual, expected), apart(expected, without)
    assert all(bool(value.isfinite().all()) for value in actual.values())
    assert difference < tolerance, f"{difference:.1e} from the loop by hand, not {tolerance:.1e}"
    assert effect > 4 * tolerance, f"the terms move the weights by {effect:.1e} only"
    return f"{difference:.1e} from the loop by hand, whose terms make {effect:.1e}"


@check
def float32_training_is_that_of_a_loop_by_hand(device: str) -> str:
    return _against_the_loop(device, "32-true", 1e-4, norm=True)


@check
def bf16_mixed_training_is_that_of_a_loop_by_hand(device: str) -> str:
    """Gradients at the logits are added in bfloat16, in another order: 2⁻⁸ of them."""
    return _against_the_loop(device, "bf16-mixed", 2**-6, norm=True)


@check
def bf16_true_training_is_that_of_a_loop_by_hand(device: str) -> str:
    """The weights themselves are rounded to 2⁻⁸ of their size in every step."""
    return _against_the_loop(device, "bf16-true", 2**-5, norm=True)


@check
def f16_training_with_steps_that_the_scaler_skips_is_that_of_a_loop_by_hand(device: str) -> str:
    said = []
    for fused in (False, True):
        for manual in (False, True):
            model = {"fused": fused, "manual": manual, "overflows": OVERFLOWS}
            said.append(_against_the_loop(device, "16-mixed", 2e-3, **model))
    return "; ".join(said)


@check
def f16_a_forced_overflow_moves_no_teacher_memory_schedule_or_head(device: str) -> str:
    for fused in (False, True):
        for manual in (False, True):
            _forced_overflow(device, fused, manual)
    return f"batches {OVERFLOWS} of {STEPS}, fused and not, automatic and manual"


def _forced_overflow(device: str, fused: bool, manual: bool) -> None:
    module, added = new(fused=fused, manual=manual, overflows=OVERFLOWS), everything()
    teacher, distilled, _, elr, head = added

    def look() -> dict[str, Any]:
        return {
            "updates": teacher.updates,
            "teacher": teacher.store.pairs()[1],
            "memory": [elr.memory.rows],
            "head": [each.detach() for each in head.head.parameters()],
            "weights": [each.detach() for each in module.parameters()],
            "factor": distilled.weight_at(teacher.engine.clocks[0]),
        }

    by_batch = ByBatch(look)
    fitted = fit(module, device, [*added, by_batch], precision="16-mixed")
    scale = fitted.precision_plugin.scaler.get_scale()
    assert scale == SCALE / 4, f"the scale is {scale}: not the two overflows that were forced"
    real = 0
    for place, now in enumerate(by_batch.seen):
        real += place not in OVERFLOWS
        assert now["updates"] == real, f"{now['updates']} updates after {real} steps"
        assert math.isclose(now["factor"], min(1.0, 0.2 + 0.8 * real / 10))
        if place == 0:
            continue
        before = by_batch.seen[place - 1]
        for what in ("teacher", "memory", "head", "weights"):
            same = [torch.equal(x, y) for x, y in zip(before[what], now[what], strict=True)]
            skipped = place in OVERFLOWS
            assert all(same) if skipped else not any(same), f"{what} at batch {place}"


# -------------------------------------------------------------------------------- do no harm
class Watching(aux.Objective):
    """Asks for the teacher's answer and the second pass of every step, at weight 0."""

    observes = True

    def loss(self, step: aux.Step) -> Tensor:
        return step.teacher("ema").logits.float().mean() + step.again().logits.float().mean()


@check
def at_weight_zero_training_is_bit_identical(device: str) -> str:
    """Random numbers are the device's: dropout draws what it would have drawn."""
    results = []
    for added in ([], [aux.EMATeacher(decay=0.5), Watching(0.0)]):
        module = new(dropout=0.2, norm=True)
        fit(module, device, added)
        results.append(weights(module))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    return f"{STEPS} steps with dropout and BatchNorm"


# ------------------------------------------------------------------------------------ resume
@check
def f23_a_resumed_teacher_is_on_the_device_of_the_parameters(device: str) -> str:
    """And training goes on as if it had never stopped."""

    class Places(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            live, values = teacher.store.pairs()
            for parameter, value in zip(live, values, strict=True):
                assert value.device == parameter.device == pl_module.device
            assert {each.device for each in teacher.store.buffers.values()} == {pl_module.device}
            assert elr.memory.rows.device == pl_module.device
            seen.append(trainer.global_step)

    seen: list[int] = []
    through, _ = attached(device, "32-true", norm=True)
    with tempfile.TemporaryDirectory() as folder:
        added = everything()
        first = fit(new(norm=True), device, added, max_epochs=2)
        first.save_checkpoint(Path(folder) / "half.ckpt")
        added = everything()
        teacher, elr = added[0], added[3]
        module = new(norm=True)
        fit(module, device, [*added, Places()], ckpt_path=str(Path(folder) / "half.ckpt"))
    assert seen == list(range(STEPS // 2 + 1, STEPS + 1))
    resumed = weights(module)
    resumed |= {f"head of ours {name}": each for name, each in weights(added[4].head).items()}
    difference = apart(resumed, through)
    assert difference < 1e-6, f"{difference:.1e} from the run that was not interrupted"
    return f"{len(seen)} steps after the resume, {difference:.1e} from no interruption"


# ----------------------------------------------------------------------------------- compile
@check
def compiled_with_inductor_training_is_that_of_the_eager_model(device: str) -> str:
    if device == "cpu" and shutil.which("g++") is None:
        raise Skip("Inductor needs a C++ compiler on the CPU")
    results = []
    for way in ("eager", "whole", "encoder"):
        torch._dynamo.reset()
        module, added = new(norm=True), everything()
        fitted: Any = module
        if way == "whole":
            fitted = torch.compile(module)
        if way == "encoder":
            module.encoder = torch.compile(module.encoder)  # type: ignore[assignment]
        fit(fitted, device, added)
        plain = {name.replace("_orig_mod.", ""): v for name, v in weights(module).items()}
        results.append(plain | {f"ours {n}": v for n, v in weights(added[4].head).items()})
    bare = new(norm=True)
    fit(bare, device)
    differences = [apart(results[0], each) for each in results[1:]]
    effect = apart(results[0], weights(bare))
    assert max(differences) < 1e-3, differences
    assert effect > 2e-2, effect
    return f"{max(differences):.1e} from eager, the terms make {effect:.1e}"


# --------------------------------------------------------------------------- synchronisation
class Synchronisations(L.Callback):
    """Counts, up to the end of each batch, what torch calls a synchronising operation."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.warned: list[Any] = []
        self.after: list[int] = []

    def found(self) -> list[Any]:
        return [each for each in self.warned if "synchronizing" in str(each.message)]

    def on_train_batch_end(self, *_: Any) -> None:
        self.after.append(len(self.found()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as self.warned:
            warnings.simplefilter("always")
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self.device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")


def _steady_steps(device: str, added: list[Any], fused: bool = False, **how: Any) -> Any:
    counted, module = Synchronisations(device), new(fused=fused, dropout=0.1)
    with counted.watching():
        # Lightning logs every 1000 steps here: never.
        fit(module, device, [*added, counted], log_every_n_steps=1000, max_epochs=8, **how)
    assert len(counted.after) == 40
    return counted.after[-1] - counted.after[LAG + 3], counted


KINDS: dict[str, Callable[[], list[Any]]] = {
    # All that is registered; the one that starts anew copies weights, which is not of every step.
    **{name: partial(each.make, 0.5) for name, each in ENTRIES.items() if name != "generations"},
    "head": lambda: [Sorted()],
    "everything": everything,
    "offload": lambda: [aux.EMAWeights(decay=0.5, offload=True)],
}


@check
def no_callback_adds_a_synchronisation_with_the_device(device: str) -> str:
    """In 20 steps that do not log, after 20 that warm up."""
    said, worse = [], []
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        without, _ = _steady_steps(device, [], precision=precision)
        for name, make in KINDS.items():
            count, counted = _steady_steps(device, make(), precision=precision)
            if count != without:
                places = sorted({f"{each.filename}:{each.lineno}" for each in counted.found()})
                worse.append(f"{name}, {precision}: {count - without:+d} in 20 steps, of {places}")
        said.append(f"{precision} {without}")
    if device == "cuda":
        assert without > 0, "a scaler asks the device in every step, and that was not seen"
    assert not worse, "; ".join(worse)
    return f"the user's own in 20 steps: {', '.join(said)}; ours none, {len(KINDS)} sets"


@check
def a_fused_optimizer_under_a_scaler_adds_at_most_one_synchronisation_a_step(device: str) -> str:
    """Such an optimizer is called on an overflow too, and only the device knows that it was one."""
    without, _ = _steady_steps(device, [], fused=True, precision="16-mixed")
    count, _ = _steady_steps(device, everything(), fused=True, precision="16-mixed")
    assert count - without <= 20, f"{count - without} in 20 steps"
    return f"{count - without} in 20 steps"


# ------------------------------------------------------------------------------- EMA updates
class Operations(TorchDispatchMode):
    """Counts operations that write values: what would be a kernel, where there are no kernels."""

    FREE = ("detach", "alias", "empty", "view", "to_local")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += not any(each in str(function) for each in self.FREE)
        return function(*args, **(kwargs or {}))


def _launches(device: str, act: Callable[[], None]) -> int:
    if device == "cpu":
        with Operations() as operations:
            act()
        return operations.count
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        act()
        torch.cuda.synchronize()
    starts = ("cudaLaunchKernel", "cuLaunchKernel")
    count = sum(each.count for each in profiled.key_averages() if each.key.startswith(starts))
    assert count > 0, "the profiler has seen no kernel"
    return count


@check
def f77_an_update_of_an_average_launches_at_most_ten_kernels(device: str) -> str:
    return _launches_of_an_update(device, torch.float32, 10)


@check
def f77_an_update_from_bfloat16_weights_launches_at_most_ten_more_to_cast_them(device: str) -> str:
    return _launches_of_an_update(device, torch.bfloat16, 20)


def _launches_of_an_update(device: str, dtype: torch.dtype, most: int) -> str:
    """Of 500 tensors, whose averages are those of a loop in float64."""
    torch.manual_seed(3)
    many = nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(500)])
    many = many.to(device, dtype)
    store = WeightStore(many)
    expected = [each.detach().double() for each in many]
    for _ in range(3):
        with torch.no_grad():
            for each in many:
                each.add_(torch.randn_like(each))
        pairs = zip(expected, many, strict=True)
        expected = [0.9 * average + 0.1 * each.detach().double() for average, each in pairs]
        store.update(0.9)
    far = [v.double() - e for v, e in zip(store.pairs()[1], expected, strict=True)]
    assert max(float(each.abs().max()) for each in far) < 1e-6
    count = _launches(device, lambda: store.update(0.9))
    assert count <= most, f"{count} launches for 500 tensors in {dtype}, not {most}"
    return f"{count} for 500 tensors"


# ------------------------------------------------------------------- averages in host memory
@check
def an_average_in_host_memory_is_the_one_on_the_device(device: str) -> str:
    """Evaluations, training, a window, a teacher that is asked in every step, and look-ahead."""

    def seen(on: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
        window = aux.SnapshotTeacher("window", every=4, window=2, offload=on)
        ahead = aux.EMATeacher(0.8, "ahead", lookahead=2, offload=on)
        average, module = aux.EMAWeights(decay=0.9, offload=on), new(norm=True)
        asked = aux.SelfDistillation("ahead", temperature=2.0)
        fit(module, device, [average, window, ahead, asked])
        held = weights(module)
        for teacher in (average.own_teacher, window, ahead):
            assert teacher is not None
            assert teacher.store is not None
            assert teacher.updates > 1
            places = {each.device.type for each in teacher.store.values()}
            assert places == ({"cpu"} if on else {device}), places
            state = teacher.state()["weights"]
            held |= {f"{teacher.name} {name}": value.cpu() for name, value in state.items()}
        own = average.own_teacher
        assert own is not None
        assert own.store is not None
        with torch.no_grad(), own.store.in_place(evaluating=True):  # as an evaluation has it
            inside = [each.detach().clone() for each in module.parameters()]
        assert {each.device for each in inside} == {module.device}
        return held, inside

    (there, used), (here, expected) = seen(True), seen(False)
    assert there.keys() == here.keys()
    difference = apart(there, here)
    # On CUDA a product and a sum are rounded once, on a processor perhaps twice.
    assert difference <= (0 if device == "cpu" else 1e-4), f"{difference:.1e}"
    far = [float((one - other).abs().max()) for one, other in zip(used, expected, strict=True)]
    assert max(far) < 1e-4
    return f"{difference:.1e} apart after {STEPS} steps"


def _large(device: str, count: int) -> nn.ParameterList:
    torch.manual_seed(3)
    size = (1024, 1024) if device == "cuda" else (16, 16)
    return nn.ParameterList([nn.Parameter(torch.randn(size)) for _ in range(count)]).to(device)


@check
def an_average_in_host_memory_has_no_memory_of_the_device(device: str) -> str:
    module = _large(device, 32)
    whole = sum(each.numel() * each.element_size() for each in module)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    store = WeightStore(module, offload=True)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        store.update(0.9)
    assert all(each.device.type == "cpu" for each in store.values())
    held = 0
    if device == "cuda":
        assert all(each.is_pinned() for each in store.values())
        held = torch.cuda.max_memory_allocated() - before
        assert held < whole / 100, f"{held} bytes for weights of {whole}"
    store.close()
    return f"{held} bytes for weights of {whole}"


@check
def the_next_step_does_not_overwrite_weights_that_are_being_copied(device: str) -> str:
    """Steps follow each other with nothing in between, so a copy is under way in each."""
    module = _large(device, 32)
    there, here = WeightStore(module, offload=True), WeightStore(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    try:
        for step in range(10):
            for each in module:
                each.grad = torch.full_like(each, 1.0 + step)
            optimizer.step()
            here.update(0.5)
            there.update(0.5)
        pairs = zip(there.values(), here.values(), strict=True)
        far = max(float((one.cpu() - other.cpu()).abs().max()) for one, other in pairs)
    finally:
        there.close()
    assert far < 1e-4, f"{far:.1e}, of steps of 1 to 10"  # weights are near 50
    return f"{far:.1e} apart, of steps of 1 to 10"


@check
def copies_to_host_memory_run_beside_the_next_forward(device: str) -> str:
    """On CUDA the profiler sees a kernel begin before a copy that was queued earlier has ended."""
    if device == "cpu":
        raise Skip("there is one device here, and copies are made at once")
    from torch.profiler import ProfilerActivity, profile

    module = _large(device, 64)
    store = WeightStore(module, offload=True)
    x = torch.randn(2048, 1024, device=device)
    store.update(0.9)
    store.values()
    (x @ module[0]).sum().item()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        store.update(0.9)
        for each in module:
            x = (x @ each.detach()).tanh()
        torch.cuda.synchronize()
        store.values()
    ran = [
        (each.name, each.time_range.start, each.time_range.end)
        for each in profiled.events()
        if str(each.device_type).endswith("CUDA")
    ]
    copies = [each for each in ran if "DtoH" in each[0]]
    kernels = [each for each in ran if not each[0].startswith("Mem")]
    assert len(copies) >= 64, f"{len(copies)} copies"
    assert kernels, "the profiler has seen no kernel"
    beside = [
        name
        for name, start, end in kernels
        if any(start < until and since < end for _, since, until in copies)
    ]
    store.close()
    assert beside, "no kernel ran while a copy did"
    return f"{len(beside)} of {len(kernels)} kernels ran while one of {len(copies)} copies did"


# ---------------------------------------------------------------------------- non-finite terms
class Breaks(Shrink):
    """Not a number once, after five steps."""

    def loss(self, step: aux.Step) -> Tensor:
        factor = float("nan") if step.progress.steps == 5 else 1.0
        return super().loss(step) * factor


@check
def a_term_that_is_not_finite_raises_within_the_documented_number_of_steps(device: str) -> str:
    module = new()
    steps: list[int] = []
    counted = ByBatch(lambda: steps.append(len(steps) + 1))
    try:
        fit(module, device, [Breaks(0.1), counted], max_epochs=8)
    except AuxiliaryError as error:
        said = str(error)
    else:
        raise AssertionError("nothing was raised in 40 steps")
    assert "the term is nan after 5 optimizer steps" in said, said
    later = len(steps) - 5
    assert later <= (LAG if device == "cuda" else 0), f"{later} steps later"
    return f"{later} steps later"


@check
def a_term_that_is_not_finite_is_left_out_and_counted_on_request(device: str) -> str:
    module, breaks = new(), Breaks(0.1, nonfinite="skip")
    fit(module, device, [breaks])
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert breaks.state() == {"skipped": 1}
    return "one of one"


# ------------------------------------------------------------------------------------- FSDP1
class Whole(L.Callback):
    """The whole weights before the strategy takes its wrappers away."""

    state: dict[str, Tensor]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        self.state = {name: value.detach().cpu().clone() for name, value in state.items()}


FSDP: dict[str, tuple[Callable[[], list[Any]], bool]] = {
    "a term on the logits": (lambda: [Shrink(0.5)], False),
    "a memory": (lambda: [aux.EarlyLearningRegularization(weight=2.0)], False),
    "a teacher": (lambda: [aux.EMATeacher(decay=0.9), aux.SelfDistillation()], True),
    "an anchor of weights": (lambda: [aux.EMAAnchor("weight", decay=0.9)], True),
    "a head": (lambda: [Sorted()], True),
}


@check
def fsdp_on_one_device_trains_as_one_device_or_refuses_before_the_first_step(device: str) -> str:
    """Teachers and heads may be refused by name; everything else has to train."""
    said = []
    plain = new()
    fit(plain, device)
    for name, (make, may_refuse) in FSDP.items():
        single = new()
        fit(single, device, make())
        effect = apart(weights(single), weights(plain))
        assert effect > 1e-3, f"{name} changes nothing"
        if device == "cpu":  # Lightning has FSDPStrategy for CUDA only
            continue
        from lightning.pytorch.strategies import FSDPStrategy

        whole, module = Whole(), new()
        count = ByBatch(lambda: None)
        try:
            fit(module, device, [*make(), whole, count], strategy=FSDPStrategy())
        except AuxiliaryError:
            if not may_refuse or count.seen:
                raise
            said.append(f"{name}: refused by name")
            continue
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        difference = apart(whole.state, weights(single))
        assert len(count.seen) == STEPS
        assert difference < 1e-4, f"{name}: {difference:.1e} from one device"
        said.append(f"{name}: {difference:.1e}")
    if device == "cpu":
        raise Skip("Lightning has FSDPStrategy for CUDA only")
    return "; ".join(said)


def run(only: str, device: str) -> tuple[int, int, int]:
    """A line for each check with `only` in its name; how many passed, failed and were skipped."""
    passed = failed = skipped = 0
    for each in CHECKS:
        if only not in each.__name__:
            continue
        began = time.perf_counter()
        try:
            result = f"ok    {each.__name__}: {each(device)}"
            passed += 1
        except Skip as reason:
            result = f"skip  {each.__name__}: {reason}"
            skipped += 1
        except Exception as error:
            text = " ".join(str(error).split())[:1500]
            result = f"FAIL  {each.__name__}: {type(error).__name__}: {text}"
            failed += 1
        print(f"{result} ({time.perf_counter() - began:.1f} s)", flush=True)
        gc.collect()
    return passed, failed, skipped
