"""``AttentionLogits``: the largest attention logit of every attention layer, while asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_aux.engine import AuxiliaryError
from lightning_aux.engine.taps import modules_at, plain_path
from lightning_aux.functional.instability import max_attention_logit
from lightning_aux.functional.shards import gathered

__all__ = ["AttentionLogits"]


class AttentionLogits:
    """Hooks that compute max q·k/√d where attention happens, and keep nothing else.

    While ``looking`` is False a hook returns at once.

    Args:
        root: the user's module, complete.
        queries: glob of the modules whose output the queries are; None for every
            ``nn.MultiheadAttention``, whose projections are computed once more.
        keys: likewise for the keys, in the same order.
        heads: of the queries.
        causal: whether a query sees the keys up to its own position only.
        asked_by: begins the message of an error.

    Raises:
        AuxiliaryError: a path names no module, or as many queries as keys are not found.
    """

    def __init__(
        self,
        root: nn.Module,
        queries: str | None,
        keys: str | None,
        heads: int | None,
        causal: bool,
        asked_by: str,
    ) -> None:
        self.looking = False
        self.found: dict[str, Tensor] = {}
        """Module path (of the queries) to what was found since `look`."""
        self._heads = heads
        self._causal = causal
        self._asked_by = asked_by
        self._waiting: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        if queries is None or keys is None:
            for name, module in root.named_modules():
                if isinstance(module, nn.MultiheadAttention):
                    self._before(module, partial(self._multihead, plain_path(name)))
            return
        asking, asked = (modules_at(root, path, asked_by) for path in (queries, keys))
        if len(asking) != len(asked):
            raise AuxiliaryError(
                f"{asked_by}: queries={queries!r} names {len(asking)} modules and keys={keys!r} "
                f"{len(asked)}: {', '.join(asking)} and {', '.join(asked)}. Name one for each."
            )
        for (name, module), other in zip(asking.items(), asked.values(), strict=True):
            if module is other:
                self._after(module, partial(self._fused, name))
            else:
                self._after(module, partial(self._queries, name))
                self._after(other, partial(self._keys, name))

    def look(self, looking: bool) -> None:
        """Look at the passes from here on, or no longer."""
        self.looking = looking
        self._waiting.clear()
        if looking:
            self.found = {}

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        self.found = {}
        self._waiting.clear()

    # ------------------------------------------------------------------------------- the hooks
    def _before(self, module: nn.Module, see: Callable[[nn.Module, Any, Any], None]) -> None:
        def hook(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if self.looking:
                with torch.no_grad():
                    see(module, arguments, keywords)

        # Before the pass: there a sharded module has its whole parameters.
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        def hook(module: nn.Module, arguments: Any, returned: Any) -> None:
            if self.looking:
                with torch.no_grad():
                    see(returned)

        self._handles.append(module.register_forward_hook(hook))

    def _multihead(self, name: str, module: nn.Module, arguments: Any, keywords: Any) -> None:
        given = dict(zip(("query", "key"), arguments, strict=False)) | keywords
        query, key = given["query"], given["key"]
        if query.is_nested:
            return
        attention: Any = module
        bias: Sequence[Tensor | None] = (None, None)
        if attention.in_proj_bias is not None:
            bias = gathered(attention.in_proj_bias).chunk(3)[:2]
        weight: Sequence[Tensor] = (attention.q_proj_weight, attention.k_proj_weight)
        if attention.in_proj_weight is not None:
            weight = gathered(attention.in_proj_weight).chunk(3)[:2]
        q, k = (
            self._batch_first(nn.functional.linear(x, gathered(w), b), attention.batch_first)
            for x, w, b in zip((query, key), weight, bias, strict=True)
        )
        q, k = (self._split(each, attention.num_heads) for each in (q, k))
        top = max_attention_logit(q, k, self._causal)
        if attention.bias_k is not None:  # a key that every query sees
            extra = self._split(gathered(attention.bias_k), attention.num_heads)
            top = torch.maximum(top, max_attention_logit(q, extra.expand(len(q), -1, -1, -1)))
        if attention.add_zero_attn:
            top = top.clamp_min(0)
        self._note(name, top)

    def _queries(self, name: str, returned: Tensor) -> None:
        self._waiting[name] = returned

    def _keys(self, name: str, returned: Tensor) -> None:
        queries = self._waiting.pop(name, None)
        if queries is None:
            raise AuxiliaryError(
                f"{self._asked_by}: the keys of {name!r} were computed before its queries. Name "
                f"the modules the other way round: the logits are the same without causal=True."
            )
        self._note(name, self._top(name, queries, returned))

    def _fused(self, name: str, returned: Tensor) -> None:
        if returned.shape[-1] % 3:
            raise AuxiliaryError(
                f"{self._asked_by}: the output of {name!r}, named for queries and keys alike, has "
                f"the shape {tuple(returned.shape)}, which is not queries, keys and values one "
                f"after the other. Name a projection of all three, (batch, length, 3 * heads * d)."
            )
        queries, keys, _ = returned.chunk(3, dim=-1)
        self._note(name, self._top(name, queries, keys))

    def _note(self, name: str, top: Tensor) -> None:
        before = self.found.get(name)
        self.found[name] = top if before is None else torch.maximum(before, top)

    # ------------------------------------------------------------------------------- the shapes
    def _top(self, name: str, queries: Tensor, keys: Tensor) -> Tensor:
        """Of ``(batch, length, heads · d)`` or ``(batch, length, heads, d)`` each."""
        if queries.ndim == 3:
            heads, width = self._heads, queries.shape[-1]
            if heads is None or width % heads or keys.shape[-1] % (width // heads):
                raise AuxiliaryError(
                    f"{self._asked_by}: the queries of {name!r} are {width} wide and its keys "
                    f"{keys.shape[-1]}, which heads={heads} does not divide. Give the number of "
                    f"heads of the queries."
                )
            queries = queries.reshape(*queries.shape[:2], heads, width // heads)
            keys = keys.reshape(*keys.shape[:2], -1, width // heads)
        if queries.ndim != 4 or keys.ndim != 4:
            raise AuxiliaryError(
                f"{self._asked_by}: the queries of {name!r} have the shape {tuple(queries.shape)} "
                f"and its keys {tuple(keys.shape)}. Name modules that return (batch, length, "
                f"heads * d) or (batch, length, heads, d)."
            )
        return max_attention_logit(queries.transpose(-2, -3), keys.transpose(-2, -3), self._causal)

    @staticmethod
    def _batch_first(projected: Tensor, batch_first: bool) -> Tensor:
        if projected.ndim == 2:
            return projected.unsqueeze(0)
        return projected if batch_first else projected.transpose(0, 1)

    @staticmethod
    def _split(projected: Tensor, heads: int) -> Tensor:
        return projected.reshape(*projected.shape[:2], heads, -1).transpose(-2, -3)
