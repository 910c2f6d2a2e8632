"""Heads: parameters of an objective that train with the user's optimizer and stay out of sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import lightning_aux as aux
from tests.engine.small_models import (
    WIDTH,
    Classifier,
    equal,
    largest_difference,
    leaves,
    rows,
    weights,
)

TOLERANCE = 1e-6


def new_head() -> nn.Linear:
    """The same initial head wherever it is made, without touching the global random stream."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return nn.Linear(8, WIDTH - 1)


class Reconstruction(aux.Objective):
    """A head on the features that predicts the input."""

    def build_head(self, module: nn.Module) -> nn.Module:
        return new_head()

    def loss(self, step: aux.Step) -> Tensor:
        predicted = self.head(step.features("encoder"))
        return F.mse_loss(predicted, step.batch[0][:, : WIDTH - 1])


def reconstruction(**arguments: Any) -> Reconstruction:
    return Reconstruction(0.5, reads=("encoder",), **arguments)


# ------------------------------------------------------- what configure_optimizers may look like
def body(module: Classifier) -> list[nn.Parameter]:
    return [*module.encoder.parameters(), *module.classifier.parameters()]


def sgd(parameters: Any, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **({"lr": 0.05, "momentum": 0.9} | arguments))


def with_scheduler(module: Classifier, owned: list[nn.Parameter]) -> dict[str, Any]:
    optimizer = sgd([*body(module), *owned])
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def one_cycle(module: Classifier, owned: list[nn.Parameter]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([*body(module), *owned], lr=0.01)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def tuple_of_lists(module: Classifier, owned: list[nn.Parameter]) -> Any:
    optimizer = sgd([*body(module), *owned])
    scheduler = LambdaLR(optimizer, lambda epoch: 0.1**epoch)
    return [optimizer], [scheduler]


def groups(module: Classifier, owned: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups with settings of their own: the head follows the first."""
    encoder = [*module.encoder.parameters(), *owned]
    return torch.optim.AdamW(
        [
            {"params": encoder, "lr": 0.03, "weight_decay": 0.2},
            {"params": list(module.classifier.parameters()), "lr": 0.001, "weight_decay": 0.0},
        ]
    )


def groups_with_schedulers(module: Classifier, owned: list[nn.Parameter]) -> dict[str, Any]:
    optimizer = groups(module, owned)
    scheduler = LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 1.0])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Eager(torch.optim.Optimizer):
    """Gradient descent that scales by the steps taken and makes its state when it is built."""

    def __init__(self, params: Any, lr: float = 0.05, power: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "power": power})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"step": torch.tensor(0.0)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    count = self.state[parameter]["step"].add_(1)
                    parameter.sub_(group["lr"] / count ** group["power"] * parameter.grad)
        return loss


CONFIGURATIONS: dict[str, Callable[[Classifier, list[nn.Parameter]], Any]] = {
    "single": lambda module, owned: sgd([*body(module), *owned]),
    "list": lambda module, owned: [sgd([*body(module), *owned])],
    "tuple of lists": tuple_of_lists,
    "dict with scheduler": with_scheduler,
    "one cycle": one_cycle,
    "parameter groups": groups,
    "groups with a scheduler each": groups_with_schedulers,
    "subset": lambda module, owned: sgd([*module.classifier.parameters(), *owned]),
    "Adagrad": lambda module, owned: torch.optim.Adagrad(
        [*body(module), *owned], lr=0.05, initial_accumulator_value=0.1
    ),
    "state made when it is built": lambda module, owned: Eager([*body(module), *owned]),
    "AdamW, amsgrad": lambda module, owned: torch.optim.AdamW(
        [*body(module), *owned], lr=0.02, amsgrad=True
    ),
    "RMSprop, centred": lambda module, owned: torch.optim.RMSprop(
        [*body(module), *owned], lr=0.01, centered=True, momentum=0.5
    ),
}


class Attached(Classifier):
    """The user's module: it knows nothing of a head."""

    def __init__(self, configuration: str) -> None:
        super().__init__()
        self.configuration = configuration

    def configure_optimizers(self) -> Any:
        return CONFIGURATIONS[self.configuration](self, [])


class ByHand(Attached):
    """The same head and term written into the module."""

    def __init__(self, configuration: str) -> None:
        super().__init__(configuration)
        self.own = new_head()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        features = self.encoder(x * x.new_tensor([1.0, 1.0, 1.0, 0.01]))
        term = F.mse_loss(self.own(features), x[:, : WIDTH - 1])
        return F.cross_entropy(self.classifier(features), y) + 0.5 * term

    def configure_optimizers(self) -> Any:
        return CONFIGURATIONS[self.configuration](self, list(self.own.parameters()))


def trained(
    plain_trainer: Any, model: L.LightningModule, *callbacks: Any, **arguments: Any
) -> dict[str, Tensor]:
    plain_trainer(max_epochs=3, callbacks=list(callbacks), **arguments).fit(model, rows())
    return weights(model)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_head_trains_as_if_it_were_written_into_the_module(configuration, clip, plain_trainer):
    torch.manual_seed(1)
    by_hand = trained(plain_trainer, ByHand(configuration), gradient_clip_val=clip)
    torch.manual_seed(1)
    objective = reconstruction()
    attached = trained(plain_trainer, Attached(configuration), objective, gradient_clip_val=clip)
    head = {f"own.{name}": value for name, value in weights(objective.head).items()}
    assert largest_difference(attached | head, by_hand) < TOLERANCE
    assert not equal(weights(objective.head), weights(new_head()))


@pytest.mark.parametrize("place", ["configure_model", "setup"])
def test_a_model_that_is_built_late_gets_its_head(place, plain_trainer):
    class Late(Attached):
        def __init__(self) -> None:
            super().__init__("parameter groups")
            del self.encoder, self.classifier

        def build(self) -> None:
            if hasattr(self, "encoder"):
                return
            with torch.random.fork_rng():
                torch.manual_seed(1)
                built = Classifier()
            self.encoder, self.classifier = built.encoder, built.classifier

        def setup(self, stage: str) -> None:
            if place == "setup":
                self.build()

        def configure_model(self) -> None:
            if place == "configure_model":
                self.build()

    objective = reconstruction()
    late = trained(plain_trainer, Late(), objective)
    torch.manual_seed(1)
    by_hand = trained(plain_trainer, ByHand("parameter groups"))
    head = {f"own.{name}": value for name, value in weights(objective.head).items()}
    assert largest_difference(late | head, by_hand) < TOLERANCE


def test_the_head_is_part_of_nothing_that_the_user_sees(plain_trainer):
    class Looking(Attached):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(
                (
                    list(self.state_dict()),
                    [name for name, _ in self.named_parameters()],
                    [name for name, _ in self.named_modules()],
                )
            )
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(seen[-1])
            assert list(self.state_dict()) == seen[-1][0]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)  # all that the module shows
            configured.append([id(each) for each in optimizer.param_groups[0]["params"]])
            return optimizer

    seen: list[Any] = []
    configured: list[Any] = []
    bare = Attached("single")
    expected = (
        list(bare.state_dict()),
        [name for name, _ in bare.named_parameters()],
        [name for name, _ in bare.named_modules()],
    )
    model = Looking("single")
    own = [id(each) for each in model.parameters()]
    plain_trainer(callbacks=[reconstruction()]).fit(model, rows())
    assert configured == [own]
    assert len(seen) == 12
    assert all(each == expected for each in seen)
    assert list(model.state_dict()) == expected[0]


def test_f36_no_parameter_is_in_two_groups_and_no_group_is_added(plain_trainer):
    """Groups that come during training break resuming."""
    objective = reconstruction()
    model = Attached("parameter groups")
    held: list[list[list[int]]] = []

    class Looking(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            held.append([[id(each) for each in group["params"]] for group in groups])

    trainer = plain_trainer(callbacks=[objective, Looking()])
    trainer.fit(model, rows())
    heads = [id(each) for each in objective.head.parameters()]
    first = [id(each) for each in model.encoder.parameters()]
    second = [id(each) for each in model.classifier.parameters()]
    assert held == [[[*first, *heads], second]] * 6
    # Afterwards the optimizer is the user's alone.
    (optimizer,) = trainer.optimizers
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == first
    assert not any(each in optimizer.state for each in objective.head.parameters())


def test_the_head_is_given_no_gradient_but_a_zero_while_its_objective_is_silent(plain_trainer):
    gradients: list[float] = []

    class Watching(Attached):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients.append(sum(float(p.grad.abs().sum()) for p in objective.head.parameters()))

    objective = reconstruction()
    objective.weight = aux.Schedule.parse("late(0.5, start=50%)")
    plain_trainer(callbacks=[objective]).fit(Watching("single"), rows())
    assert gradients[:3] == [0.0, 0.0, 0.0]
    assert all(each > 0 for each in gradients[3:])


def test_two_heads_train_beside_each_other(plain_trainer):
    one, other = reconstruction(name="one"), reconstruction(name="other")
    trained(plain_trainer, Attached("single"), one, other)
    # The same head, data and features: equal paths, and both have moved.
    assert largest_difference(weights(one.head), weights(other.head)) < TOLERANCE
    assert not equal(weights(one.head), weights(new_head()))


def test_a_module_without_an_optimizer_is_told_that_a_head_needs_one(plain_trainer):
    class Without(Classifier):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(
        aux.AuxiliaryError, match=r"configure_optimizers returned no optimizer.*reconstruction"
    ):
        plain_trainer(callbacks=[reconstruction()]).fit(Without(), rows())


@pytest.mark.parametrize("weight", [0.5, "late(0.5, start=50%)"])
def test_f38_two_processes_train_one_head(weight, plain_trainer, tmp_path):
    """Other data on each process, the same weights: those of one process with all of it (F38).

    Where the objective is silent, its head still gives the reducer the gradient it waits for (F39).
    """

    class Reporting(Attached):
        def train_dataloader(self) -> Any:
            each = self.trainer.world_size
            return rows(24, 4 // each, sampler=range(self.global_rank, 24, each))

        def on_train_end(self) -> None:
            both = {"model": weights(self), "head": weights(objective.head)}
            torch.save(both, tmp_path / f"{self.trainer.world_size}-{self.global_rank}.pt")

    for processes in (1, 2):
        torch.manual_seed(1)
        objective = reconstruction()
        objective.weight = aux.Schedule.parse(weight)
        how = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {}
        trainer = plain_trainer(
            max_epochs=2, callbacks=[objective], use_distributed_sampler=False, **how
        )
        trainer.fit(Reporting("dict with scheduler"))
    one, first, second = (torch.load(tmp_path / f"{each}.pt") for each in ("1-0", "2-0", "2-1"))
    for part in ("model", "head"):
        assert equal(first[part], second[part])
        assert largest_difference(first[part], one[part]) < 1e-5
    assert not equal(first["head"], weights(new_head()))


# ----------------------------------------------------------------------------------- checkpoints
RESUMED = ["single", "parameter groups", "Adagrad", "one cycle", "AdamW, amsgrad"]
RESUMED += ["state made when it is built"]


def two_epochs(plain_trainer: Any, configuration: str, folder: Path, **fit: Any) -> Any:
    """Train for four epochs in all, saving after the second."""
    torch.manual_seed(1)
    objective = reconstruction()
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = plain_trainer(max_epochs=4, callbacks=[objective, saving], enable_checkpointing=True)
    trainer.fit(Attached(configuration), rows(), **fit)
    return trainer, objective


@pytest.mark.parametrize("configuration", RESUMED)
def test_f36_resuming_gives_the_head_its_weights_and_moments_to_the_last_bit(
    configuration, plain_trainer, tmp_path
):
    whole, kept = two_epochs(plain_trainer, configuration, tmp_path / "whole")
    resumed, restored = two_epochs(
        plain_trainer,
        configuration,
        tmp_path / "resumed",
        ckpt_path=tmp_path / "whole" / "epoch=1.ckpt",
    )
    assert equal(weights(whole.lightning_module), weights(resumed.lightning_module))
    assert equal(weights(kept.head), weights(restored.head))
    mine, yours = (each.optimizers[0].state_dict() for each in (whole, resumed))
    assert mine["param_groups"] == yours["param_groups"]
    assert mine["state"].keys() == yours["state"].keys()
    for index, state in mine["state"].items():
        pairs = zip(leaves(state), leaves(yours["state"][index]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("configuration", RESUMED)
def test_the_optimizer_state_in_the_checkpoint_is_that_of_a_run_without_us(
    configuration, plain_trainer, tmp_path
):
    two_epochs(plain_trainer, configuration, tmp_path)
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    model = Attached(configuration)
    assert list(checkpoint["state_dict"]) == list(model.state_dict())
    configured = model.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])  # groups and sizes must fit
    for parameter, state in optimizer.state.items():
        for value in leaves({key: each for key, each in state.items() if key != "step"}):
            assert value.shape == parameter.shape


def test_f36_a_checkpoint_without_the_head_starts_it_fresh_and_keeps_the_users_moments(
    plain_trainer, tmp_path
):
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = plain_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(Attached("parameter groups"), rows())
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["optimizer_states"][0]

    moments: list[Any] = []

    class Peeking(Attached):
        def on_train_start(self) -> None:
            state = self.optimizers().state
            moments.extend(state[each]["exp_avg"].clone() for each in self.parameters())
            assert not any(each in state for each in objective.head.parameters())

    objective = reconstruction()
    resumed = plain_trainer(max_epochs=3, callbacks=[objective])
    with pytest.warns(UserWarning, match="start fresh|starts fresh"):
        resumed.fit(Peeking("parameter groups"), rows(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.global_step == 18
    assert len(moments) == len(saved["state"])
    for moment, (_, state) in zip(moments, sorted(saved["state"].items()), strict=True):
        assert torch.equal(moment, state["exp_avg"])


def test_a_checkpoint_with_a_head_resumes_without_it(plain_trainer, tmp_path):
    two_epochs(plain_trainer, "parameter groups", tmp_path)
    resumed = plain_trainer(max_epochs=5)
    resumed.fit(Attached("parameter groups"), rows(), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert resumed.global_step == 30


def test_a_head_of_another_shape_is_a_named_error(plain_trainer, tmp_path):
    class Wider(Reconstruction):
        def build_head(self, module: nn.Module) -> nn.Module:
            return nn.Linear(8, WIDTH)

    two_epochs(plain_trainer, "single", tmp_path)
    other = Wider(0.5, reads=("encoder",), name="reconstruction")
    with pytest.raises(aux.AuxiliaryError, match="heads in the checkpoint are not those"):
        plain_trainer(max_epochs=5, callbacks=[other]).fit(
            Attached("single"), rows(), ckpt_path=tmp_path / "epoch=3.ckpt"
        )


# --------------------------------------------------------- optimizers, and states the user saves
class Writing(Classifier):
    """Saves the state of its optimizer by itself, too."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = self.optimizers().state_dict()


def test_what_the_user_saves_of_an_optimizer_has_no_head_in_it(plain_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{epoch}")
    term = reconstruction()
    trainer = plain_trainer(callbacks=[term, saving], enable_checkpointing=True)
    trainer.fit(Writing(), rows())
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    alone = Writing().configure_optimizers()
    alone.load_state_dict(saved["own"])  # raises where the number of parameters differs
    own, theirs = saved["own"]["state"], saved["optimizer_states"][0]["state"]
    assert own.keys() == theirs.keys() == {0, 1, 2, 3}
    assert all(torch.equal(own[key]["exp_avg"], theirs[key]["exp_avg"]) for key in own)


def test_a_head_trains_on_after_a_state_that_could_not_be_loaded(plain_trainer):
    class Careless(Writing):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                with pytest.raises(ValueError, match="parameter group"):
                    self.optimizers().load_state_dict({"state": {}, "param_groups": []})

    results = []
    for kind in (Writing, Careless):
        term = reconstruction()
        torch.manual_seed(0)
        plain_trainer(callbacks=[term]).fit(kind(), rows())
        results.append(weights(term.head))
    assert equal(*results)
    assert not equal(results[0], weights(new_head()))


@pytest.mark.parametrize("kind", ["LBFGS", "ZeroRedundancyOptimizer"])
def test_an_optimizer_that_would_not_train_a_head_is_refused_before_training(kind, plain_trainer):
    class Refused(Classifier):
        def configure_optimizers(self) -> Any:
            if kind == "LBFGS":
                return torch.optim.LBFGS(self.parameters())
            # The real one wants a process group; it is known by its name.
            return type(kind, (torch.optim.SGD,), {})(self.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained")

    with pytest.raises(aux.AuxiliaryError, match=f"reconstruction: {kind} .* cannot join it"):
        plain_trainer(callbacks=[reconstruction()]).fit(Refused(), rows())
