"""``StochasticDepthSchedule``: a block is kept or left out per sample, at the rate of the schedule.

Hooks see what goes into a block and what comes out of it; the mask is read off these two and the
block by hand, so nothing here shares code with the callback.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_aux as aux
from lightning_aux.attribute_schedules.stochastic_depth import kept
from lightning_aux.engine import AuxiliaryError
from tests.contract.models import ResumableLoader
from tests.engine.small_models import CLASSES, WIDTH, Rows, equal, largest_difference, rows, weights

HIDDEN = 6


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, width: int = HIDDEN, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Any:
        return x + self.body(x)


class Net(L.LightningModule):
    """A stem, residual blocks and a head."""

    def __init__(
        self,
        blocks: int = 3,
        make: Callable[[], nn.Module] = Block,
        lr: float = 0.05,
        checkpointing: bool | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, HIDDEN)
        self.blocks = nn.ModuleList(make() for _ in range(blocks))
        self.classifier = nn.Linear(HIDDEN, CLASSES)
        self.lr = lr
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x * x.new_tensor([1.0, 1.0, 1.0, 0.01]))
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
            x = x[0] if isinstance(x, tuple | list) else x
        return self.classifier(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Masks(L.Callback):
    """Reads off, in every training step, by what each block's branch was multiplied."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def on_train_start(self, trainer: Any, model: Any) -> None:
        for path, module in model.named_modules():
            if isinstance(module, Block):
                module.register_forward_hook(self.note(path))

    def note(self, path: str) -> Callable[..., None]:
        def hook(block: Block, inputs: tuple[Tensor], output: Tensor) -> None:
            if block.training:
                self.found.setdefault(path, []).append(mask_of(block, inputs[0], output))

        return hook


def mask_of(block: Block, x: Tensor, output: Tensor) -> Tensor:
    """The factor of each sample; all its numbers have to agree on it."""
    with torch.no_grad():
        branch = torch.tanh(F.linear(x, block.body[0].weight, block.body[0].bias))
        found = ((output - x) * branch).sum(1) / branch.square().sum(1)
        torch.testing.assert_close(output, x + found[:, None] * branch, rtol=1e-4, atol=1e-5)
    return found


def fit(
    plain_trainer: Any,
    model: L.LightningModule,
    callbacks: list[Any],
    data: Any = None,
    **more: Any,
) -> L.LightningModule:
    plain_trainer(callbacks=callbacks, **more).fit(model, rows() if data is None else data)
    return model


def seeded(**arguments: Any) -> Net:
    torch.manual_seed(7)
    return Net(**arguments)


# ------------------------------------------------------------------------------------ do no harm
@pytest.mark.parametrize("rate", [0.0, "step(0, 0, at=2)"])
def test_at_rate_zero_training_is_bit_identical_to_none_and_draws_no_random_numbers(
    rate, plain_trainer
):
    results, streams = [], []
    for callbacks in ([], [aux.StochasticDepthSchedule(rate, "blocks.*")]):
        model = seeded(make=lambda: Block(dropout=0.3))
        fit(plain_trainer, model, callbacks, rows(shuffle=True), max_epochs=2)
        results.append(weights(model))
        streams.append(torch.get_rng_state())
    assert equal(*results)
    assert torch.equal(*streams)


def test_in_evaluation_the_blocks_are_the_users_while_the_rate_is_high(plain_trainer):
    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                by_hand = self.stem(batch[0] * batch[0].new_tensor([1.0, 1.0, 1.0, 0.01]))
                for block in self.blocks:
                    by_hand = by_hand + block.body(by_hand)
                same.append(torch.equal(self(batch[0]), self.classifier(by_hand)))

    same: list[bool] = []
    schedule = aux.StochasticDepthSchedule(0.9, "blocks.*")
    trainer = plain_trainer(callbacks=[schedule], max_epochs=2)
    trainer.fit(Validated(), rows(), rows(8))
    assert same == [True] * 6  # with the sanity check


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_the_users_random_stream_is_never_shifted(per, plain_trainer):
    """Whatever the rate: the user's dropout, shuffling and noise are those of a run without us."""
    streams, noises = [], []

    class Noisy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            noises[-1].append(torch.rand(()).item())
            return loss

    for callbacks in ([], [aux.StochasticDepthSchedule(0.8, "blocks.*", per=per)]):
        noises.append([])
        torch.manual_seed(7)
        fit(plain_trainer, Noisy(make=lambda: Block(dropout=0.3)), callbacks, rows(shuffle=True))
        streams.append(torch.get_rng_state())
    assert noises[0] == noises[1]
    assert torch.equal(*streams)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_modules_afterwards(fails, plain_trainer):
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            patched.append(["forward" in vars(each) for each in self.blocks])
            if fails and batch_idx == 2:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

    patched: list[list[bool]] = []
    model = Failing()
    before = [dict(vars(each)) for each in model.modules() if each is not model]
    names = list(model.state_dict())
    schedule = aux.StochasticDepthSchedule(0.5, "blocks.*")
    with pytest.raises(RuntimeError, match="failed") if fails else nullcontext():
        fit(plain_trainer, model, [schedule])
    assert patched[0] == [True] * 3
    assert [dict(vars(each)) for each in model.modules() if each is not model] == before
    assert list(model.state_dict()) == names
    x = torch.randn(5, HIDDEN)
    assert torch.equal(model.blocks[0](x), x + model.blocks[0].body(x))


# ------------------------------------------------------------------------------- what it computes
def test_each_sample_of_each_block_is_left_out_or_divided_by_what_is_kept(plain_trainer):
    masks = Masks()
    schedule = aux.StochasticDepthSchedule(0.4, "blocks.*", profile="constant")
    fit(plain_trainer, Net(lr=0.0), [masks, schedule], rows(96, 16))
    drawn = torch.stack([torch.stack(each) for each in masks.found.values()])
    assert drawn.shape == (3, 6, 16)
    is_zero, is_kept = drawn.abs() < 1e-4, (drawn - 1 / 0.6).abs() < 1e-3
    assert (is_zero ^ is_kept).all()
    # Every step and block has draws of its own, and so has every sample.
    assert len({tuple(each) for each in is_zero.flatten(0, 1).tolist()}) == 18
    assert len({tuple(each) for each in is_zero.flatten(0, 1).T.tolist()}) == 16


def test_per_batch_all_samples_of_a_step_share_one_draw(plain_trainer):
    masks = Masks()
    schedule = aux.StochasticDepthSchedule(0.5, "blocks.*", profile="constant", per="batch")
    fit(plain_trainer, Net(lr=0.0), [masks, schedule], max_epochs=4)
    drawn = torch.stack([torch.stack(each) for each in masks.found.values()])
    assert drawn.shape == (3, 24, 4)
    assert float((drawn.amax(2) - drawn.amin(2)).abs().max()) < 1e-3
    steps = drawn[..., 0]
    assert ((steps.abs() < 1e-3) ^ ((steps - 2).abs() < 1e-3)).all()
    assert 0.3 < float((steps > 1).float().mean()) < 0.7


def test_the_gradient_is_that_of_the_masked_sum_by_hand(plain_trainer):
    class Compared(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            x = self.stem(batch[0] * batch[0].new_tensor([1.0, 1.0, 1.0, 0.01]))
            for path, block in zip(("0", "1", "2"), self.blocks, strict=True):
                x = x + masks.found[f"blocks.{path}"][-1].round(decimals=3)[:, None] * block.body(x)
            by_hand = F.cross_entropy(self.classifier(x), batch[1])
            parameters = list(self.parameters())
            ours = torch.autograd.grad(loss, parameters, retain_graph=True)
            theirs = torch.autograd.grad(by_hand, parameters)
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            return loss

    masks = Masks()
    schedule = aux.StochasticDepthSchedule(0.5, "blocks.*", profile="constant")
    fit(plain_trainer, Compared(lr=0.0), [masks, schedule])
    assert len(masks.found["blocks.0"]) == 6


class Wide(L.LightningModule):
    """20,000 samples through blocks that add one, so what comes out says which were kept."""

    def __init__(self, blocks: int = 1, backend: str | None = None) -> None:
        super().__init__()
        self.model = nn.Sequential(*(AddOne() for _ in range(blocks)))
        self.compiler = None if backend is None else CompileCounterWithBackend(backend)
        if backend is not None:
            self.model.compile(backend=self.compiler)
        self.scale = nn.Parameter(torch.zeros(()))
        self.shares: list[float] = []
        self.graphs: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.model(torch.zeros(20_000, 1) + self.scale)
        return {"loss": output.mean(), "output": output.detach()}

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        self.shares.append(float((outputs["output"] == 0).float().mean()))
        self.graphs.append(self.compiler.frame_count if self.compiler is not None else 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones_like(x)


INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    ],
)
# With lr 0, one block of many samples: the standard deviation of a share is at most 0.35 %.
FALLING = [0.8 * (1 - step / 11) for step in range(12)]


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", INDUCTOR])
def test_the_share_that_is_left_out_follows_the_schedule(backend, plain_trainer):
    model = Wide(backend=backend)
    schedule = aux.StochasticDepthSchedule(
        0.8, "model.0", mode="early", until="100%", shape="linear"
    )
    fit(plain_trainer, model, [schedule], max_epochs=2)
    assert model.shares == pytest.approx(FALLING, abs=0.02)
    if backend is not None:
        assert 0 < model.graphs[2] <= 3
        assert model.graphs[-1] == model.graphs[2]


@pytest.mark.parametrize("compiled", [False, True])
def test_at_rate_one_every_sample_is_passed_on_as_it_came(compiled, plain_trainer):
    model = Wide(backend="eager" if compiled else None)
    schedule = aux.StochasticDepthSchedule(1.0, "model.0", mode="early", until=3)
    fit(plain_trainer, model, [schedule])
    assert model.shares == [1.0] * 3 + [0.0] * 3


def whole(model: Net, **how: Any) -> Any:
    return torch.compile(model, **how)


def by_method(model: Net, **how: Any) -> Any:
    model.compile(**how)
    return model


def each_block(model: Net, **how: Any) -> Any:
    for place, block in enumerate(model.blocks):
        model.blocks[place] = torch.compile(block, **how)
    return model


def each_block_by_method(model: Net, **how: Any) -> Any:
    for block in model.blocks:
        block.compile(**how)
    return model


WAYS = {each.__name__: each for each in (whole, by_method, each_block, each_block_by_method)}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_trains_as_the_eager_one_without_compiling_anew(way, plain_trainer):
    """The masks are the same, since they do not come from the compiler's random numbers."""
    graphs: list[int] = []
    counter = CompileCounterWithBackend("aot_eager")

    class Counting(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            graphs.append(counter.frame_count)

    results = []
    for compiled in (False, True):
        schedule = aux.StochasticDepthSchedule("linear(0.9, 0.1)", "blocks.*", profile="constant")
        model = seeded()
        wrapped = WAYS[way](model, backend=counter) if compiled else model
        callbacks = [schedule, Counting()] if compiled else [schedule]
        fit(plain_trainer, wrapped, callbacks, max_epochs=2)
        found = weights(model).items()
        results.append({name.replace("_orig_mod.", ""): value for name, value in found})
    assert largest_difference(*results) < 1e-5
    without = weights(fit(plain_trainer, seeded(), [], max_epochs=2))
    assert largest_difference(results[0], without) > 1e-2
    assert 0 < graphs[2] == graphs[-1]


def test_a_full_graph_stays_one(plain_trainer):
    schedule = aux.StochasticDepthSchedule("linear(0.9, 0.1)", "blocks.*")
    model = torch.compile(seeded(), backend="eager", fullgraph=True)
    fit(plain_trainer, model, [schedule], max_epochs=2)


# ------------------------------------------------------------------------------ profile and globs
class Stages(L.LightningModule):
    """Two stages with a nested list of blocks, as a pyramid has them."""

    def __init__(self, stages: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.stages = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList(AddOne() for _ in range(count))})
            for count in stages
        )
        self.shares: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = torch.zeros(20_000, 1) + self.scale
        noted = {}
        for path, block in self.named_modules():
            if isinstance(block, AddOne):
                x, before = block(x), x
                noted[path] = float((x == before).float().mean())
        self.shares.append(noted)
        return x.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_linear_profile_rises_with_every_block_over_nested_paths(plain_trainer):
    model = Stages()
    schedule = aux.StochasticDepthSchedule(0.8, "stages.*.blocks.*")
    fit(plain_trainer, model, [schedule], rows(8))
    by_hand = {
        "stages.0.blocks.0": 0.0,
        "stages.0.blocks.1": 0.2,
        "stages.1.blocks.0": 0.4,
        "stages.1.blocks.1": 0.6,
        "stages.1.blocks.2": 0.8,
    }
    for shares in model.shares:
        assert shares == pytest.approx(by_hand, abs=0.02)


def test_the_profile_goes_by_the_order_in_the_model_not_in_the_list(plain_trainer):
    model = Stages((12,))  # blocks.10 comes after blocks.9
    schedule = aux.StochasticDepthSchedule(
        0.8, ["stages.0.blocks.1?", "stages.0.blocks.2", "stages.0.blocks.9"]
    )
    fit(plain_trainer, model, [schedule], rows(4))
    by_hand = dict.fromkeys((f"stages.0.blocks.{place}" for place in range(12)), 0.0)
    by_hand |= {"stages.0.blocks.9": 0.8 / 3, "stages.0.blocks.10": 1.6 / 3}
    by_hand |= {"stages.0.blocks.11": 0.8}
    assert model.shares[0] == pytest.approx(by_hand, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        ({"profile": "constant"}, [0.6] * 5),
        ({"blocks": "stages.1.blocks.1"}, [0.0, 0.0, 0.0, 0.6, 0.0]),
        ({"blocks": ["stages.0.blocks.*", "stages.1.blocks.2"]}, [0.0, 0.3, 0.0, 0.0, 0.6]),
    ],
)
def test_what_the_globs_name_is_left_out_and_nothing_else(arguments, by_hand, plain_trainer):
    model = Stages()
    schedule = aux.StochasticDepthSchedule(**{"p": 0.6, "blocks": "stages.*.blocks.*"} | arguments)
    fit(plain_trainer, model, [schedule], rows(4))
    assert list(model.shares[0].values()) == pytest.approx(by_hand, abs=0.02)


def test_of_nested_modules_that_a_glob_names_the_outer_ones_are_the_blocks(plain_trainer):
    patched: list[set[str]] = []

    class Looking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            named = self.named_modules()
            patched.append({path for path, each in named if path and "forward" in vars(each)})
            return super().training_step(batch, batch_idx)

    fit(plain_trainer, Looking(), [aux.StochasticDepthSchedule(0.5, "blocks.*")])
    assert patched == [{"blocks.0", "blocks.1", "blocks.2"}] * 6


# ------------------------------------------------------------------------- recomputation, resuming
@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant, per, plain_trainer):
    results = []
    for checkpointing in (None, reentrant):
        schedule = aux.StochasticDepthSchedule(0.5, "blocks.*", profile="constant", per=per)
        model = seeded(make=lambda: Block(dropout=0.3), checkpointing=checkpointing)
        fit(plain_trainer, model, [schedule], max_epochs=2)
        results.append(weights(model))
    assert largest_difference(*results) < 1e-7


@pytest.mark.parametrize("window", [1, 2])
def test_a_run_that_is_resumed_within_an_epoch_is_bit_identical(window, plain_trainer, tmp_path):
    def train(model: Net, *more: Any, **arguments: Any) -> Net:
        schedule = aux.StochasticDepthSchedule("linear(0.2, 0.9)", "blocks.*")
        trainer = plain_trainer(
            callbacks=[schedule, *more],
            max_epochs=3,
            accumulate_grad_batches=window,
            enable_checkpointing=bool(more),
        )
        trainer.fit(model, ResumableLoader(Rows(32), batch_size=4), **arguments)
        return model

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    whole = train(seeded(), saving)
    fresh = Net()
    resumed = train(fresh, ckpt_path=tmp_path / "step=5.ckpt", weights_only=True)
    assert equal(weights(resumed), weights(whole))
    plain = seeded()
    fit(plain_trainer, plain, [], ResumableLoader(Rows(32), batch_size=4), max_epochs=3)
    assert not equal(weights(plain), weights(whole))


def test_within_an_accumulation_window_the_rate_is_one_and_the_draws_are_not(plain_trainer):
    masks = Masks()
    schedule = aux.StochasticDepthSchedule("step(0.75, 0.5, at=1)", "blocks.*", profile="constant")
    fit(
        plain_trainer,
        Net(blocks=1, lr=0.0),
        [masks, schedule],
        rows(96, 16),
        accumulate_grad_batches=3,
    )
    largest = [round(float(each.max()), 3) for each in masks.found["blocks.0"]]
    assert largest == [4.0] * 3 + [2.0] * 3
    assert len({tuple((each > 1).tolist()) for each in masks.found["blocks.0"]}) == 6


# ----------------------------------------------------------------------------------- kinds of block
class WithTuple(Block):
    def forward(self, x: Tensor) -> Any:
        return x + self.body(x), "attention", x.detach() * 3


class WithList(Block):
    def forward(self, x: Tensor) -> Any:
        return [x + self.body(x), x.detach() * 3]


@pytest.mark.parametrize("kind", [WithTuple, WithList])
def test_of_a_tuple_the_first_is_mixed_and_the_rest_passed_on(kind, plain_trainer):
    seen: list[Any] = []

    def look(block: Block, inputs: tuple[Tensor], output: Any) -> None:
        seen.append((type(output), len(output), torch.equal(output[-1], inputs[0] * 3)))
        masks.append(mask_of(block, inputs[0], output[0]))

    masks: list[Tensor] = []
    model = Net(make=kind, blocks=1, lr=0.0)
    model.blocks[0].register_forward_hook(look)
    fit(plain_trainer, model, [aux.StochasticDepthSchedule(0.5, "blocks.0")], rows(96, 16))
    wanted = (tuple, 3, True) if kind is WithTuple else (list, 2, True)
    assert seen == [wanted] * 6
    drawn = torch.cat(masks)
    assert ((drawn.abs() < 1e-4) ^ ((drawn - 2).abs() < 1e-3)).all()
    assert (drawn > 1).any()
    assert (drawn < 1).any()


def test_a_block_that_is_called_by_keyword_is_the_same(plain_trainer):
    class ByKeyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            before = x
            for block in self.blocks:
                x = block(x=x)
            passed.append(torch.equal(x, before))
            return self.classifier(x)

    passed: list[bool] = []
    schedule = aux.StochasticDepthSchedule(1.0, "blocks.*", "early", until=2, profile="constant")
    fit(plain_trainer, ByKeyword(), [schedule])
    assert passed == [True] * 2 + [False] * 4


def test_half_precision_stays_half_precision(plain_trainer):
    dtypes: list[torch.dtype] = []
    model = Net(lr=0.0).bfloat16()
    model.blocks[2].register_forward_hook(lambda block, given, output: dtypes.append(output.dtype))
    model.training_step = lambda batch, batch_idx: model(batch[0].bfloat16()).float().mean()
    fit(plain_trainer, model, [aux.StochasticDepthSchedule(0.5, "blocks.*")])
    assert dtypes == [torch.bfloat16] * 6


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class InPlace(nn.Module):
    """What comes in is gone when the block is done."""

    def forward(self, x: Tensor) -> Tensor:
        x += torch.ones_like(x)
        return x


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": x + 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Halving, r"block 'blocks\.0' makes \(4, 3\) of \(4, 6\), so there is nothing to pass on"),
        (InPlace, r"block 'blocks\.0' returns its input itself"),
        (Counted, r"block 'blocks\.0' does not map a tensor to a tensor"),
    ],
)
@pytest.mark.parametrize("rate", [0.5, "step(0, 0.5, at=5)"])
def test_a_block_that_has_nothing_to_pass_on_is_an_error_in_the_first_step_at_any_rate(
    make, message, rate, plain_trainer
):
    model = Net(make=make, blocks=1)
    with pytest.raises(AuxiliaryError, match=message):
        fit(plain_trainer, model, [aux.StochasticDepthSchedule(rate, "blocks.0")])
    assert model.global_step == 0
    assert "forward" not in vars(model.blocks[0])


# -------------------------------------------------------------------------------------- the draws
LIKE = torch.zeros(64, 2, 3)


def draw(batch: int, rate: float = 0.5, salt: int = 3, per_sample: bool = True) -> Tensor:
    numbers = torch.tensor(rate), torch.tensor(batch), torch.tensor(salt)
    return kept(LIKE, *numbers, per_sample)


def test_processes_steps_and_blocks_draw_differently_and_each_always_the_same():
    """A process is told from another by the number of its batch."""
    assert draw(1).shape == (64, 1, 1)
    assert torch.equal(draw(1), draw(1))
    drawn = [draw(1), draw(2), draw(10**9), draw(1, salt=4)]
    torch.manual_seed(123)
    drawn.append(draw(1))
    for place, one in enumerate(drawn):
        for other in drawn[place + 1 :]:
            agree = float((one == other).float().mean())
            assert 0.2 < agree < 0.8  # 64 fair coins


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_over_many_batches_a_whole_batch_is_left_out_at_the_rate(rate):
    drawn = torch.stack([draw(batch, rate, per_sample=False) for batch in range(4000)])
    assert (drawn == drawn[:, :1]).all()
    assert float((drawn[:, 0] == 0).float().mean()) == pytest.approx(rate, abs=0.03)
    assert float(drawn.max()) == pytest.approx(1 / (1 - rate))


# -------------------------------------------------------------------------------------- refusals
class Never(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ([{"blocks": "block.*"}], r"stochastic_depth_schedule: .*'block\.\*'.*Near.*'blocks\.0'"),
        ([{"p": "linear(0, 2)"}], "takes the value 1.*and a rate lies in"),
        ([{}, {"name": "other", "blocks": ["blocks.1"]}], r"blocks\.1 is driven by .* already"),
    ],
)
def test_what_the_model_does_not_allow_is_refused_before_the_first_step(
    schedules, message, plain_trainer
):
    callbacks = [
        aux.StochasticDepthSchedule(**{"p": 0.5, "blocks": "blocks.*"} | each) for each in schedules
    ]
    model = Never()
    with pytest.raises(AuxiliaryError, match=message):
        fit(plain_trainer, model, callbacks)
    assert all("forward" not in vars(each) for each in model.blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, r"p=1\.5 is not a rate"),
        ({"per": "pixel"}, "per='pixel' is neither 'sample' nor 'batch'"),
        ({"profile": "steep"}, "profile='steep' is neither"),
        ({"mode": "early"}, "mode='early' takes until="),
    ],
)
def test_arguments_that_cannot_be_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(AuxiliaryError, match=message):
        aux.StochasticDepthSchedule(**{"p": 0.5, "blocks": "blocks.*"} | arguments)


def test_two_parts_of_a_model_can_have_a_schedule_each(plain_trainer):
    model = Stages()
    one = aux.StochasticDepthSchedule(0.5, "stages.0.blocks.*", profile="constant", name="one")
    two = aux.StochasticDepthSchedule(0.2, "stages.1.blocks.*", profile="constant", name="two")
    fit(plain_trainer, model, [one, two], rows(4))
    assert list(model.shares[0].values()) == pytest.approx([0.5] * 2 + [0.2] * 3, abs=0.02)
