"""``ParameterAnchor``: each form is its formula, written as a plain loop."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import lightning_aux as aux
from lightning_aux.functional import data_emphasized_divergence, wasserstein_distance
from tests.engine.small_models import Classifier, equal, largest_difference, rows, weights


# ---------------------------------------------------------------------------------------- formulas
def test_the_distribution_of_values_is_what_counts():
    theta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    phi = theta.detach().flatten()[torch.randperm(12)].view(3, 4)
    assert float(wasserstein_distance([theta], [phi])) == 0.0
    other = torch.randn(3, 4, dtype=torch.float64)
    distance = wasserstein_distance([theta], [other])
    ours, theirs = theta.detach().flatten().tolist(), other.flatten().tolist()
    expected = sum((a - b) ** 2 for a, b in zip(sorted(ours), sorted(theirs), strict=True))
    assert float(distance) == pytest.approx(expected, abs=1e-12)
    distance.backward()
    # The gradient of each value is towards the value of the same rank.
    ranks = {value: rank for rank, value in enumerate(sorted(ours))}
    aims = other.flatten().sort().values
    by_hand = [2 * (value - float(aims[ranks[value]])) for value in ours]
    assert torch.allclose(theta.grad.flatten(), torch.tensor(by_hand, dtype=torch.float64))


def test_the_divergence_is_that_of_the_normal_distributions_at_the_best_variance():
    theta = [torch.randn(7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    phi = [torch.randn(7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)]
    sigma = torch.tensor(0.3, dtype=torch.float64)
    distances = [(t - p).square().sum() for t, p in zip(theta, phi, strict=True)]

    def divergence(variances: list[Tensor]) -> Tensor:
        parts = [
            kl_divergence(Normal(t, sigma), Normal(p, v.sqrt())).sum()
            for t, p, v in zip(theta, phi, variances, strict=True)
        ]
        return sum(parts) / 12

    best = [d / len(t) + sigma**2 for d, t in zip(distances, theta, strict=True)]
    found = data_emphasized_divergence(distances, [7, 5], sigma)
    assert torch.allclose(found, divergence(best), atol=1e-12)
    for factor in (0.9, 1.1):
        assert divergence([factor * each for each in best]) > found


# ---------------------------------------------------------------------------------------- attached
def trained(plain_trainer: Any, *callbacks: Any, model: Any = None, **options: Any) -> Any:
    module = model or Classifier()
    plain_trainer(**({"max_steps": 8, "max_epochs": -1} | options), callbacks=list(callbacks)).fit(
        module, rows()
    )
    return module


def test_the_wasserstein_form_trains_like_the_loop(plain_trainer):
    class ByHand(Classifier):
        def on_train_start(self) -> None:
            self.first = [each.detach().clone() for each in self.parameters()]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            distance = sum(
                (p.flatten().sort().values - f.flatten().sort().values).square().sum()
                for p, f in zip(self.parameters(), self.first, strict=True)
            )
            return super().training_step(batch, batch_idx) + 0.7 * distance / 2

    torch.manual_seed(1)
    ours = trained(plain_trainer, aux.ParameterAnchor(form="wasserstein", weight=0.7))
    torch.manual_seed(1)
    theirs = trained(plain_trainer, model=ByHand())
    torch.manual_seed(1)
    without = trained(plain_trainer)
    assert largest_difference(weights(ours), weights(theirs)) < 1e-6
    assert largest_difference(weights(ours), weights(without)) > 1e-3


def test_the_anchor_may_be_a_teacher_or_a_file(plain_trainer, tmp_path):
    torch.manual_seed(1)
    first = Classifier()
    torch.save(first.state_dict(), tmp_path / "first.pt")
    strong = {"weight": 1e3, "checkpoint": tmp_path / "first.pt"}
    module = trained(
        plain_trainer, aux.ParameterAnchor(**strong), model=Classifier(lr=2e-4), max_steps=300
    )
    assert largest_difference(weights(module), weights(first)) < 0.02
    torch.manual_seed(1)
    moving = trained(plain_trainer, aux.EMATeacher(0.5), aux.ParameterAnchor("ema", weight=0.1))
    torch.manual_seed(1)
    # ½ ‖θ − φ‖² here, ‖θ − φ‖² there.
    anchor = aux.EMAAnchor(space="weight", decay=0.5, weight=0.05)
    assert largest_difference(weights(moving), weights(trained(plain_trainer, anchor))) < 1e-6


def test_only_the_parameters_that_are_named_are_anchored(plain_trainer):
    torch.manual_seed(1)
    initial = weights(Classifier())
    torch.manual_seed(1)
    free = trained(plain_trainer)
    torch.manual_seed(1)
    held = trained(plain_trainer, aux.ParameterAnchor(weight=5.0, parameters="encoder.*"))
    for name, value in initial.items():
        far = [(weights(each)[name] - value).norm() for each in (held, free)]
        assert (far[0] < 0.5 * far[1]) == name.startswith("encoder")


# ------------------------------------------------------------------------------------- variational
class Variational(Classifier):
    """The self-tuning anchor written into the model: weights are sampled by ``functional_call``."""

    def __init__(self, noise: list[list[Tensor]]) -> None:
        super().__init__()
        self.noise = noise
        self.rho = nn.Parameter(torch.tensor(0.05).expm1().log())

    def on_train_start(self) -> None:
        named = dict(self.named_parameters())
        self.first = {n: p.detach().clone() for n, p in named.items() if n != "rho"}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        sigma = F.softplus(self.rho)
        drawn = self.noise[self.trainer.global_step]
        named = {n: p for n, p in self.named_parameters() if n != "rho"}
        sampled = {
            name: p + sigma * noise for (name, p), noise in zip(named.items(), drawn, strict=True)
        }
        logits = torch.func.functional_call(self, sampled, (batch[0],))
        old = [n for n in named if n.startswith("encoder")]
        new = [n for n in named if n.startswith("classifier")]
        distances = [
            sum((named[n] - self.first[n]).square().sum() for n in old),
            sum(named[n].square().sum() for n in new),
        ]
        counts = [sum(named[n].numel() for n in group) for group in (old, new)]
        kl = 0.0
        for d, count in zip(distances, counts, strict=True):
            best = d / count + sigma**2
            kl = (
                kl
                + (sigma**2 / best * count + d / best - count + count * (best / sigma**2).log()) / 2
            )
        return F.cross_entropy(logits, batch[1]) + kl / sum(counts)


def test_the_variational_form_trains_like_sampled_weights(plain_trainer):
    anchor = aux.ParameterAnchor(form="variational", sigma=0.05, new="classifier.*")
    drawn: list[list[Tensor]] = []

    class Watching(L.Callback):
        def on_before_backward(self, *_: Any) -> None:
            drawn.append([each.clone() for each in anchor._noise._drawn])

    torch.manual_seed(1)
    ours = trained(plain_trainer, anchor, Watching())
    torch.manual_seed(1)
    theirs = trained(plain_trainer, model=Variational(drawn))
    expected = weights(theirs)
    rho = expected.pop("rho")
    assert largest_difference(weights(ours), expected) < 2e-4
    assert torch.allclose(anchor.head.rho, rho, atol=2e-4)
    assert float((rho - torch.tensor(0.05).expm1().log()).abs()) > 1e-2


def test_noisy_weights_are_never_saved_validated_or_left_behind(plain_trainer, tmp_path):
    class Validated(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.after: list[dict[str, Tensor]] = []
            self.seen: list[dict[str, Tensor]] = []

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *_: self.after.append(weights(self)))
            return optimizer

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(weights(self))

    module = Validated()
    anchor = aux.ParameterAnchor(form="variational", sigma=0.1)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    plain_trainer(
        max_epochs=1, callbacks=[anchor, saving], val_check_interval=2, enable_checkpointing=True
    ).fit(module, rows(), rows(4))
    for step, expected in enumerate(module.after, start=1):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert equal(saved, expected)
    for seen, expected in zip(module.seen[-3:], module.after[1::2], strict=True):
        assert equal(seen, expected)
    assert equal(weights(module), module.after[-1])

    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    broken = Fails()
    before = weights(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        trained(plain_trainer, aux.ParameterAnchor(form="variational", sigma=0.1), model=broken)
    assert equal(weights(broken), before)


class Saving(L.Callback):
    """Saves when training fails, before ours have been told."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_that_is_saved_within_a_step_has_no_noise(plain_trainer, tmp_path):
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise RuntimeError("on purpose")
            return loss

    module, own = Fails(), []
    keeps = L.Callback()
    keeps.on_train_batch_start = lambda *_: own.append(weights(module))
    anchor = aux.ParameterAnchor(form="variational", sigma=0.1)
    with pytest.raises(RuntimeError, match="on purpose"):
        plain_trainer(callbacks=[keeps, Saving(tmp_path / "x.ckpt"), anchor]).fit(module, rows())
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert equal(saved, own[-1])


def test_a_step_in_which_no_optimizer_steps_leaves_no_noise(plain_trainer):
    class Rarely(Classifier):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx % 2:
                super().optimizer_step(epoch, batch_idx, optimizer, closure)
            else:  # the gradients are computed, and nothing is done with them
                before = weights(self)
                closure()
                assert equal(weights(self), before)

    trained(plain_trainer, aux.ParameterAnchor(form="variational", sigma=0.1), model=Rarely())


def test_noise_is_that_of_the_seed_of_the_run(plain_trainer, tmp_path):
    def run(seed: int, **resume: Any) -> Any:
        L.seed_everything(3)
        module = Classifier()
        L.seed_everything(seed)
        trainer = plain_trainer(
            max_epochs=resume.pop("max_epochs", 2),
            callbacks=[aux.ParameterAnchor(form="variational", sigma=0.1)],
        )
        trainer.fit(module, rows(), **resume)
        return module, trainer

    through, _ = run(3)
    _, half = run(3, max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(4, ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(through))


def test_the_users_random_stream_is_left_alone_and_resuming_draws_the_same(plain_trainer, tmp_path):
    def run(**resume: Any) -> Any:
        L.seed_everything(3)
        module = Classifier()
        trainer = plain_trainer(
            max_epochs=resume.pop("max_epochs", 2),
            callbacks=[aux.ParameterAnchor(form="variational", sigma=0.1)],
        )
        trainer.fit(module, rows(), **resume)
        return module, trainer, torch.get_rng_state()

    through, _, random = run()
    _, half, _ = run(max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, *_ = run(ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(through))
    L.seed_everything(3)
    plain_trainer(max_epochs=2).fit(Classifier(), rows())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["a_first", "z_last"])
def test_a_generation_with_noise_begins_from_the_initial_weights(name, plain_trainer):
    """Whichever of the restart and the noise has its name first; each step is that of torch."""

    class Seen(Classifier):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.after: list[dict[str, Tensor]] = []

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()

            def move(*_: Any) -> None:  # a step whose size is known
                with torch.no_grad():
                    for each in self.parameters():
                        each.add_(1.0)
                self.after.append(weights(self))

            optimizer.register_step_post_hook(move)
            return optimizer

    module = Seen()
    first = weights(module)
    trained(
        plain_trainer,
        aux.SnapshotTeacher("m", every=4, restart=True),
        aux.ParameterAnchor(form="variational", sigma=0.1, name=name),
        model=module,
    )
    for number, each in enumerate(module.after):
        expected = {key: value + number % 4 + 1 for key, value in first.items()}
        assert largest_difference(each, expected) < 1e-5


def test_parameters_are_named_as_if_nothing_were_compiled(plain_trainer):
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.compile(self.encoder, backend="eager")

    found = []
    for model, glob in (
        (Classifier, "encoder.0.*"),
        (Compiled, "encoder.0.*"),
        (Compiled, "encoder._orig_mod.0.*"),
    ):
        torch.manual_seed(1)
        module = trained(
            plain_trainer, aux.ParameterAnchor(weight=5.0, parameters=glob), model=model()
        )
        found.append([each.detach().clone() for each in module.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "l1"}, "form='l1' is unknown"),
        ({"to": "ema", "checkpoint": "x.pt"}, "both say where the anchor is"),
        ({"form": "wasserstein", "new_weight": 0.1}, "new_weight needs form='l2'"),
        ({"sigma": 0.1}, "sigma needs form='variational'"),
        ({"form": "variational", "sigma": -1.0}, r"sigma=-1\.0 must be positive"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(aux.AuxiliaryError, match=message):
        aux.ParameterAnchor(**arguments)


def test_what_can_be_known_before_training_is_said_then(plain_trainer):
    with pytest.raises(aux.AuxiliaryError, match=r"no trainable parameter is called 'encodr\.\*'"):
        trained(plain_trainer, aux.ParameterAnchor(parameters="encodr.*"))
    with pytest.raises(aux.AuxiliaryError, match="accumulate_grad_batches=1"):
        trained(plain_trainer, aux.ParameterAnchor(form="variational"), accumulate_grad_batches=2)
    for schedule in ({0: 4}, {1: 2}):  # Trainer.accumulate_grad_batches is 1 before training
        with pytest.raises(aux.AuxiliaryError, match="accumulate_grad_batches=1, also in a Grad"):
            trained(
                plain_trainer,
                GradientAccumulationScheduler(schedule),
                aux.ParameterAnchor(form="variational"),
                max_epochs=2,
            )


def test_two_noises_on_one_parameter_are_refused_and_on_different_ones_are_not(plain_trainer):
    def anchors(*globs: str) -> list[Any]:
        return [
            aux.ParameterAnchor(form="variational", parameters=each, name=f"anchor_{place}")
            for place, each in enumerate(globs)
        ]

    message = r"anchor_0: anchor_1 adds its noise to 'encoder\.0\.bias' too"
    with pytest.raises(aux.AuxiliaryError, match=message):
        trained(plain_trainer, *anchors("*.bias", "encoder.0.bias"))
    trained(plain_trainer, *anchors("encoder.*", "classifier.*"))
