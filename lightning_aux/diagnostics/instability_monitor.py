"""``InstabilityMonitor``: what grows, or vanishes, before training becomes unstable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_aux.diagnostics.attention_logits import AttentionLogits
from lightning_aux.engine import Attached, AuxiliaryError, Engine, Locations, Progress, Step
from lightning_aux.engine.distributed import has_flat_parameters, processes
from lightning_aux.engine.logging import log_of_member, logs_now
from lightning_aux.functional.instability import logit_size, root_mean_squares
from lightning_aux.taps import Taps

__all__ = ["InstabilityMonitor"]

WHAT_HELPS = {
    "max_attention_logit": "a lower learning rate, a longer warm-up, or normalising queries and "
    "keys (qk-layernorm)",
    "max_log_z": "a ZLoss of weight 1e-4, or a lower learning rate",
    "min_gradient_rms_over_eps": "a smaller eps of the optimizer",
}


class InstabilityMonitor(Attached):
    """Logs the signs of instability in transformers, and warns once of each.

    Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities",
    arXiv:2309.14322. On steps where Lightning logs, and only there, under ``aux/<name>/``:

    - ``max_logit``, ``log_z``: the largest output logit of the batch, of all processes, and the
      mean of log Z = log Σ_k exp z_k (section 3.1.2: divergence of the output logits);
    - ``max_attention_logit``: the largest q·k/√d of all attention layers and processes (section
      3.1.1); those of each layer on this process are in the attribute `attention_logits`;
    - ``gradient_rms``, ``gradient_rms_min``: root mean square of all gradients, and of the weight
      where it is smallest;
    - ``gradient_rms_over_eps``: the smallest ratio of a weight's gradient RMS to the eps of its
      optimizer (Adam and relatives). Where it falls to 1, updates shrink and parameters freeze
      (section 3.4).

    A weight is a parameter of two or more dimensions whose gradient is not exactly 0. Biases and
    gains are no part of the two minima: the gradient of a key bias, for one, is 0 up to rounding in
    every transformer, since softmax does not see it.

    Gradients are those that the optimizer has just used: of the whole accumulated window, averaged
    over processes, unscaled and clipped. Where a gradient scaler skips the step there are none.
    Of a sharded model (FSDP2) each process computes its part. A user's ``zero_grad`` in manual
    optimisation has to come after, not within, ``optimizer.step()``.

    Every ``nn.MultiheadAttention`` is found by itself; of other attention name the modules whose
    outputs are multiplied. Rotary embeddings and normalisations that follow a projection belong to
    the logits: name the last module before the product, ``q_norm`` rather than ``q_proj``. The
    maximum is over all pairs of positions, also those that a mask hides, unless ``causal``.

    Args:
        queries: module path or glob of the modules whose output the queries are, one for each
            layer: ``(batch, length, heads · d)`` or ``(batch, length, heads, d)``.
        keys: likewise; fewer key heads serve several heads each. The same path as ``queries`` for
            a projection whose output is queries, keys and values one after the other.
        heads: of the queries, where the output has them in one dimension.
        causal: whether a query sees the keys up to its own position only.
        logits: whether to look at the output logits, which a model without logits has not.
        dim: class dimension of the logits.
        max_attention_logit: warn once above it; None never.
        max_log_z: warn once where the mean log Z is beyond it, on either side of 0; None never.
        min_gradient_rms_over_eps: warn once below it, and name the tensor; None never.
        optimizer: with several optimizers, the index of the one whose gradients are looked at.
        taps: where logits and mask are, before any `Taps` of the Trainer.
        name: unique name for logs.

    Raises:
        AuxiliaryError: queries without keys or the other way round; before training, a path that
            names no module, numbers of queries and keys that differ, or flattened parameters
            (FSDP1); in the first step, no logits, or shapes that do not fit. Never for a value.
    """

    turn = 2  # after diagnostics that run the model in `before_step`

    def __init__(
        self,
        queries: str | None = None,
        keys: str | None = None,
        heads: int | None = None,
        causal: bool = False,
        logits: bool = True,
        dim: int = -1,
        max_attention_logit: float | None = 1e4,
        max_log_z: float | None = None,
        min_gradient_rms_over_eps: float | None = 1.0,
        optimizer: int = 0,
        taps: Taps | None = None,
        name: str = "instability_monitor",
    ) -> None:
        super().__init__(name)
        if (queries is None) != (keys is None):
            raise AuxiliaryError(
                f"{name}: queries={queries!r} and keys={keys!r}: a logit is a product of both. "
                f"Name the modules of both, or leave both out for nn.MultiheadAttention."
            )
        self.queries = queries
        self.keys = keys
        self.heads = heads
        self.causal = causal
        self.logits = logits
        self.dim = dim
        self.limits = {
            "max_attention_logit": max_attention_logit,
            "max_log_z": max_log_z,
            "min_gradient_rms_over_eps": min_gradient_rms_over_eps,
        }
        self.optimizer = optimizer
        self.locations = Locations() if taps is None else taps.locations
        self._attention: AttentionLogits | None = None
        self._forward: dict[str, Tensor] = {}
        self._seen = False
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_attention": None, "_forward": {}}

    @property
    def attention_logits(self) -> dict[str, Tensor]:
        """Largest attention logit of each layer by its module path, of the latest logged step."""
        return {} if self._attention is None else dict(self._attention.found)

    # ------------------------------------------------------------------------------- membership
    def check(self, engine: Engine) -> None:
        flat = has_flat_parameters(engine.module)
        if flat:
            raise AuxiliaryError(
                f"{self.name}: {flat[0]!r} is part of a flattened parameter, which has no gradient "
                f"of its own. Use ModelParallelStrategy (FSDP2), or a strategy that keeps whole "
                f"parameters."
            )
        self._seen, self._warned = False, set()
        if self.logits:
            engine.capture.add(self.locations.module_paths(), self.name)
        self._attention = AttentionLogits(
            engine.module, self.queries, self.keys, self.heads, self.causal, self.name
        )

    def stop(self) -> None:
        if self._attention is not None:
            self._attention.remove()
        self._attention = None
        self._forward = {}

    def before_step(self, now: Progress) -> None:
        assert self._attention is not None
        # The first step too, where errors show.
        self._attention.look(not self._seen or logs_now(self.engine.trainer))

    def observe(self, step: Step) -> None:
        assert self._attention is not None
        self._attention.looking, self._seen = False, True
        layers = self._attention.found
        found: dict[str, Tensor] = {}
        largest = torch.full((2,), -torch.inf, device=step.loss.device)
        try:
            if self.logits:
                largest[0], found["log_z"] = logit_size(step.logits, step.mask, self.dim)
            if layers:
                largest[1] = torch.stack([each.to(largest) for each in layers.values()]).amax()
        except ValueError as error:
            raise AuxiliaryError(f"{self.name}: {error}") from error
        finally:  # the other processes wait for this one, whatever happens here
            if processes() > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found |= {"max_logit": largest[0]} if self.logits else {}
        found |= {"max_attention_logit": largest[1]} if layers else {}
        self._forward = found
        self._alarm_of_forward(found, step.progress.steps)

    def logged(self) -> dict[str, Any]:
        return dict(self._forward)

    def after_optimizer_step(self, now: Progress) -> None:
        engine = self.engine
        if not logs_now(engine.trainer):
            return
        used = [
            (parameter, parameter.grad, _eps_of(group))
            for group in engine.trainer.optimizers[self.optimizer].param_groups
            for parameter in group["params"]
            if parameter.grad is not None and not parameter.grad.is_sparse and parameter.numel()
        ]
        if not used:
            return
        each, together = root_mean_squares([gradient for _, gradient, _ in used])
        found = {"gradient_rms": together}
        weights = [place for place, (parameter, _, _) in enumerate(used) if parameter.ndim > 1]
        if weights:
            nonzero = each[weights].masked_fill(each[weights] == 0, torch.inf)
            found["gradient_rms_min"] = nonzero.min()
            eps = [used[place][2] for place in weights]
            if any(eps):
                ratio, place = (nonzero / nonzero.new_tensor(eps)).min(0)
                found["gradient_rms_over_eps"] = ratio
                self._alarm_of_gradients(ratio, [used[at][0] for at in weights], place, now.steps)
        log_of_member(engine.module, self.name, found)

    # ------------------------------------------------------------------------------- the alarm
    def _alarm_of_forward(self, found: dict[str, Tensor], steps: int) -> None:
        limit = self._limit("max_attention_logit")
        if limit is not None and "max_attention_logit" in found:
            value = float(found["max_attention_logit"])
            if not value <= limit:
                layers = self.attention_logits
                where = max(layers, key=lambda name: float(layers[name]))
                self._warn(
                    "max_attention_logit",
                    f"the largest attention logit is {value:.3g} (on this process in {where!r}), "
                    f"above {limit:g}, after {steps} optimizer steps",
                )
        limit = self._limit("max_log_z")
        if limit is not None and "log_z" in found:
            value = float(found["log_z"])
            if not abs(value) <= limit:
                self._warn(
                    "max_log_z",
                    f"the mean log Z of the output logits is {value:.3g}, beyond {limit:g}, after "
                    f"{steps} optimizer steps",
                )

    def _alarm_of_gradients(
        self, ratio: Tensor, weights: list[Tensor], place: Tensor, steps: int
    ) -> None:
        limit = self._limit("min_gradient_rms_over_eps")
        if limit is not None and float(ratio) < limit:
            faint = weights[int(place)]
            named = self.engine.module.named_parameters()
            which = next((repr(name) for name, each in named if each is faint), "a head")
            self._warn(
                "min_gradient_rms_over_eps",
                f"the gradient of {which} has a root mean square of {float(ratio):.3g} times the "
                f"optimizer's eps, below {limit:g}, after {steps} optimizer steps, so it moves "
                f"less than its learning rate says",
            )

    def _limit(self, name: str) -> float | None:
        """The limit, if nobody has been warned of it."""
        return None if name in self._warned else self.limits[name]

    def _warn(self, name: str, what: str) -> None:
        self._warned.add(name)
        rank_zero_warn(
            f"lightning_aux: {self.name}: {what}. What helps: {WHAT_HELPS[name]}. "
            f"{name}=None says no more of it."
        )


def _eps_of(group: dict[str, Any]) -> float:
    """The eps that an optimizer adds to the root of a mean square; 0 for one that has none."""
    eps = group.get("eps", 0.0)
    return eps if isinstance(eps, float) else 0.0
