"""``ParameterAnchor``: keep the weights near where they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress, Step
from lightning_aux.engine.clock import accumulates
from lightning_aux.engine.distributed import shards_parameters
from lightning_aux.engine.errors import near_matches
from lightning_aux.engine.stand_in import StandIn
from lightning_aux.engine.taps import matches_any, plain_path
from lightning_aux.functional import (
    data_emphasized_divergence,
    squared_distance,
    wasserstein_distance,
)
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule
from lightning_aux.teachers import FrozenTeacher

__all__ = ["ParameterAnchor"]


class ParameterAnchor(Objective):
    """Pulls parameters towards their initial values, an average, or their initial distribution.

    ``"l2"``: ``½ ‖θ − φ‖² + ν/2 ‖θ_new‖²``, L2-SP (Li, Grandvalet & Davoine 2018, "Explicit
    Inductive Bias for Transfer Learning with Convolutional Networks", arXiv:1802.01483, equation
    2; ``weight`` is its α, and ``weight · new_weight`` its β).

    ``"wasserstein"``: ``½ Σ ‖sort(θ) − sort(φ)‖²``, tensor by tensor: the weights may move, their
    distribution may not; see `wasserstein_distance`.

    ``"variational"``: the strength tunes itself. In every step the loss is that of weights to which
    noise ``σ·ε`` is added, σ is learned with the model's optimizer, and the term is the divergence
    of that distribution from a prior around ``φ`` whose variance is the best one in closed form;
    see `data_emphasized_divergence` (Harvey, Petrov & Hughes 2025, arXiv:2502.01861). Leave
    ``weight`` at 1.

    Args:
        to: name of a teacher among the Trainer's callbacks, whose weights are φ. Default: the
            weights that ``fit`` begins with, kept through resumed runs.
        form: ``"l2"``, ``"wasserstein"`` or ``"variational"``.
        weight: factor of the term, see `Objective`. Default: 0.01, and 1 for ``"variational"``.
        parameters: globs of the names of parameters that are anchored.
        new: globs of the names of those that were not there before (a new classifier), which are
            pulled towards zero instead.
        new_weight: ν, of the latter relative to the former; ``"l2"`` only.
        sigma: the σ that ``"variational"`` begins with.
        checkpoint: path of a checkpoint whose weights are φ, in place of ``to``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: an unknown form, arguments of another form, both ``to`` and ``checkpoint``;
            before training, a glob that matches no trainable parameter, ``"wasserstein"`` with
            sharded parameters, ``"variational"`` with sharded parameters, in manual optimisation,
            with accumulation, or twice for one parameter.

    Note:
        ``"variational"`` logs ``sigma`` and, for each group, the variance of the prior; between
        the beginning of a step and its end the module has the noisy weights, never in evaluation
        or in a checkpoint. The noise has a random stream of its own, the same on all processes.
    """

    turn = 2  # the noise comes after whatever else changes or measures the weights

    def __init__(
        self,
        to: str | None = None,
        form: Literal["l2", "wasserstein", "variational"] = "l2",
        weight: float | str | Schedule | None = None,
        parameters: str | Iterable[str] = "*",
        new: str | Iterable[str] = (),
        new_weight: float = 1.0,
        sigma: float = 1e-4,
        checkpoint: str | Path | None = None,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        if weight is None:
            weight = 1.0 if form == "variational" else 0.01
        super().__init__(weight, **common)
        if form not in ("l2", "wasserstein", "variational"):
            raise AuxiliaryError(
                f"{self.name}: form={form!r} is unknown. Choose 'l2', 'wasserstein' or "
                f"'variational'."
            )
        if to is not None and checkpoint is not None:
            raise AuxiliaryError(
                f"{self.name}: to={to!r} and checkpoint={str(checkpoint)!r} both say where the "
                f"anchor is. Give one."
            )
        if form != "l2" and new_weight != 1.0:
            raise AuxiliaryError(f"{self.name}: new_weight needs form='l2', not {form!r}.")
        if form != "variational" and sigma != 1e-4:
            raise AuxiliaryError(f"{self.name}: sigma needs form='variational', not {form!r}.")
        if sigma <= 0:
            raise AuxiliaryError(f"{self.name}: sigma={sigma} must be positive.")
        self.form = form
        self.parameters = (parameters,) if isinstance(parameters, str) else tuple(parameters)
        self.new = (new,) if isinstance(new, str) else tuple(new)
        self.new_weight = new_weight
        self.sigma = sigma
        self.own_teacher: FrozenTeacher | None = None
        if to is None:
            to = f"{self.name}.anchor"
            self.own_teacher = FrozenTeacher(to, checkpoint)
        self.to = to
        self._groups: list[list[int]] = []  # places of anchored and of new ones in step.weights
        self._grouped_for: list[nn.Parameter] = []
        self._names: dict[int, str] = {}
        self._noise = _Noise(self.name)
        self._noted: tuple[list[Tensor], list[int]] = [], []

    def companions(self) -> list[Attached]:
        return [] if self.own_teacher is None else [self.own_teacher]

    def build_head(self, module: nn.Module) -> nn.Module | None:
        return _Sigma(self.sigma) if self.form == "variational" else None

    def check(self, engine: Engine) -> None:
        super().check(engine)
        self.learn_from(self.to, engine, weights=True)
        named = engine.module.named_parameters()
        names = {plain_path(name) for name, each in named if each.requires_grad}
        for glob in (*self.parameters, *self.new):
            if not any(matches_any(name, (glob,)) for name in names):
                raise AuxiliaryError(
                    f"{self.name}: no trainable parameter is called {glob!r}. "
                    f"{near_matches(glob, sorted(names))}"
                )
        if self.form != "l2" and shards_parameters(engine.trainer.strategy):
            raise AuxiliaryError(
                f"{self.name}: form={self.form!r} needs whole parameters, which this strategy "
                f"shards. Use form='l2', or ddp."
            )
        if self.form == "variational":
            self._check_noise(engine, names)

    def _check_noise(self, engine: Engine, names: set[str]) -> None:
        if accumulates(engine.trainer) or not engine.module.automatic_optimization:
            raise AuxiliaryError(
                f"{self.name}: form='variational' draws new weights for every step, which works "
                f"with automatic optimisation and accumulate_grad_batches=1, also in a "
                f"GradientAccumulationScheduler."
            )
        for other in engine.members.values():
            if other is self or not isinstance(other, ParameterAnchor):
                continue
            both = sorted(name for name in names if self._anchors(name) and other._anchors(name))
            if other.form == "variational" and both:
                raise AuxiliaryError(
                    f"{self.name}: {other.name} adds its noise to {', '.join(map(repr, both[:3]))}"
                    f"{' and more' if both[3:] else ''} too. Let parameters= and new= of the two "
                    f"name different parameters, or use form='l2' for one."
                )

    def _anchors(self, name: str) -> bool:
        return matches_any(name, (*self.parameters, *self.new))

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        self._names = _names_in(engine.module)
        if self.form == "variational":
            engine.stand_ins.append(self._noise.stand_in)

    # ------------------------------------------------------------------------------- the term
    def loss(self, step: Step) -> Tensor:
        live, anchors = step.weights(self.to)
        anchored, new = self._split(step.module, live)
        groups = [group for group in (anchored, new) if group]
        if self.form == "wasserstein":
            return (
                sum(
                    (
                        wasserstein_distance(
                            [live[i] for i in group], self._aims(group, anchors, new)
                        )
                        for group in groups
                    ),
                    start=live[0].new_zeros(()),
                )
                / 2
            )
        distances = [
            squared_distance([live[i] for i in group], self._aims(group, anchors, new))
            for group in groups
        ]
        if self.form == "variational":
            counts = [sum(live[i].numel() for i in group) for group in groups]
            # What is logged, and what backward will add to the gradients for the term itself.
            self._noted = [each.detach() for each in distances], counts
            return data_emphasized_divergence(distances, counts, self.head())
        factors = [self.new_weight if group is new else 1.0 for group in groups]
        return (
            sum(
                (factor * each for factor, each in zip(factors, distances, strict=True)),
                start=distances[0].new_zeros(()),
            )
            / 2
        )

    def _aims(self, group: list[int], anchors: list[Tensor], new: list[int]) -> list[Tensor]:
        """What the live weights of a group are compared with."""
        aims = [anchors[i] for i in group]
        if group is new:
            aims = [torch.zeros_like(each) for each in aims]
        # The noise that the live weights have now is not a distance from the anchor.
        return self._noise.onto(aims, group)

    def _split(self, module: nn.Module, live: list[nn.Parameter]) -> tuple[list[int], list[int]]:
        """Places of the anchored parameters and of the new ones among ``live``."""
        same = len(live) == len(self._grouped_for) and all(map(_is, live, self._grouped_for))
        if not same:
            # Within a step FSDP2 may show whole parameters in place of those that it keeps.
            named = self._names
            if any(id(each) not in named for each in live):
                named |= _names_in(module)
            new = [i for i, p in enumerate(live) if matches_any(named[id(p)], self.new)]
            kept = {i for i, p in enumerate(live) if matches_any(named[id(p)], self.parameters)}
            self._groups = [sorted(kept - {*new}), new]
            self._grouped_for = list(live)
        anchored, new = self._groups
        return anchored, new

    # ------------------------------------------------------------------------ variational only
    def before_step(self, now: Progress) -> None:
        if self.form != "variational" or self.weight_at(now.steps) == 0.0:
            return
        live, _ = self.engine.teacher(self.to, self.name).pairs()
        anchored, new = self._split(self.engine.module, live)
        chosen = sorted([*anchored, *new])
        seed = self.engine.seed + crc32(f"{self.name} {now.steps}".encode())
        self._noise.add({i: live[i] for i in chosen}, self.head().detach(), seed % 2**63)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._noise.stand_in.restore()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # Here the gradients are no longer scaled.
        if self._noise.drawn:
            cast("_Sigma", self.head).learn(self._slope())
            self._noise.remove()

    @torch.no_grad()
    def _slope(self) -> Tensor | None:
        """How the user's loss at the noisy weights changes with σ: Σ ε · dL/dθ.

        Of the gradients that are there, those of the term are not the loss's: weight · (θ − φ) /
        (D λ*), since it is a function of the weights without the noise.
        """
        slope = self._noise.slope()
        if slope is None:
            return None
        _, anchors = self.engine.teacher(self.to, self.name).pairs()
        distances, counts = self._noted
        variance = self.head().square()
        groups = [group for group in self._groups if group]
        weight = self.weight_at(self.engine.progress(self.optimizer).steps)
        for group, distance, count in zip(groups, distances, counts, strict=True):
            aims = [anchors[i] for i in group]
            if group is self._groups[1]:
                aims = [torch.zeros_like(each) for each in aims]
            own = weight / sum(counts) / (distance / count + variance)
            slope = slope - own * self._noise.along(group, aims)
        return slope

    def stop(self) -> None:
        super().stop()
        self._noise.remove()
        self._grouped_for, self._names = [], {}

    def logged(self) -> dict[str, Any]:
        logged = super().logged()
        if self.form == "variational":
            sigma = self.head().detach()
            logged["sigma"] = sigma
            for place, (distance, count) in enumerate(zip(*self._noted, strict=True)):
                name = ("variance", "new_variance")[place]
                logged[name] = distance / count + sigma.square()
        return logged


class _Sigma(nn.Module):
    """σ = softplus(ρ), learned with the user's optimizer."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.tensor(sigma).expm1().log())

    def forward(self) -> Tensor:
        return F.softplus(self.rho)

    @torch.no_grad()
    def learn(self, slope: Tensor | None) -> None:
        """Add dL/dσ, which backward could not know of, to the gradient."""
        if slope is not None:
            gradient = slope * torch.sigmoid(self.rho)
            self.rho.grad = gradient if self.rho.grad is None else self.rho.grad + gradient


class _Noise:
    """σ·ε on parameters, from the beginning of a step until its gradients are there."""

    def __init__(self, whose: str) -> None:
        self.stand_in = StandIn(whose, self._noisy)
        self._live: dict[int, nn.Parameter] = {}
        self._drawn: list[Tensor] = []  # ε
        self._scaled: dict[int, Tensor] = {}  # σ·ε

    @property
    def drawn(self) -> bool:
        """Whether there is noise whose gradients have not been asked for."""
        return bool(self._live)

    @torch.no_grad()
    def add(self, live: dict[int, nn.Parameter], sigma: Tensor, seed: int) -> None:
        self.remove()  # of a step that had no optimizer step
        values: list[Tensor] = list(live.values())
        generator = torch.Generator(values[0].device).manual_seed(seed)
        self._drawn = [
            torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            for p in values
        ]
        scaled = list(torch._foreach_mul(self._drawn, sigma.to(values[0])))
        self._scaled = dict(zip(live, scaled, strict=True))
        self._live = live
        self.stand_in.put(values)

    def _noisy(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch._foreach_add(list(values), [*self._scaled.values()])

    def onto(self, values: list[Tensor], places: list[int]) -> list[Tensor]:
        """The same noise on other values, those of ``places``."""
        if not self.stand_in.in_place:
            return values
        noise = [
            self._scaled[place].to(each.dtype) for place, each in zip(places, values, strict=True)
        ]
        return list(torch._foreach_add(values, noise))

    @torch.no_grad()
    def slope(self) -> Tensor | None:
        """Σ ε · dL/dθ: how the loss changes with σ."""
        pairs = [
            (epsilon, each.grad)
            for epsilon, each in zip(self._drawn, self._live.values(), strict=True)
            if each.grad is not None
        ]
        if not pairs:
            return None
        products = torch._foreach_mul([e for e, _ in pairs], [g for _, g in pairs])
        return torch.stack([each.sum(dtype=torch.float32) for each in products]).sum()

    @torch.no_grad()
    def along(self, places: list[int], anchors: list[Tensor]) -> Tensor:
        """Σ ε · (θ − φ) over the parameters at ``places``, which have no noise any more."""
        order = {place: i for i, place in enumerate(self._live)}
        own: list[Tensor] = [self._live[place] for place in places]
        drawn = [self._drawn[order[place]] for place in places]
        away = torch._foreach_sub(own, anchors)
        products = torch._foreach_mul(drawn, away)
        return torch.stack([each.sum(dtype=torch.float32) for each in products]).sum()

    def remove(self) -> None:
        """Give the parameters their own values back, bit for bit; again if interrupted."""
        self.stand_in.restore()
        self._live = {}


def _is(one: Any, other: Any) -> bool:
    return one is other


def _names_in(module: nn.Module) -> dict[int, str]:
    return {id(each): plain_path(name) for name, each in module.named_parameters()}
