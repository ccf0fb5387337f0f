"""Attention met where every model passes: at torch's scaled-dot-product attention, inside of one block call only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parafuse.errors import UnsupportedError
from parafuse.kernels.attention import Call, Choice
from parafuse.parallel.attention import SequenceAttention
from parafuse.parallel.block_plan import SiteLayouts
from parafuse.parallel.hooks import Forward, OnForward, override_forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import SequenceGroup

_DIMS = 4
"""Of queries, keys and values that backends take: (B, H, S, D)."""
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AttentionMode(TorchFunctionMode):
    """Hands each scaled-dot-product attention of one block call to `attend(site number, q, k, v, call, given)`."""

    def __init__(self, attend: Callable[[int, Tensor, Tensor, Tensor, Call, dict[str, Any]], Tensor]):
        super().__init__()
        self.attend, self.site = attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.unflatten or func is Tensor.split:
            # Written in Python: torch.compile looks into them from here, and stumbles; a call of the method it knows.
            return getattr(args[0], func.__name__)(*args[1:], **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = dict(zip(_SDPA_ARGUMENTS, args, strict=False))
        given |= kwargs or {}
        if given.get("dropout_p"):
            raise UnsupportedError("attention with dropout: call eval() on the model first")
        site, self.site = self.site, self.site + 1
        call = Call(given.get("attn_mask"), given.get("scale"), bool(given.get("is_causal")))
        return self.attend(site, given["query"], given["key"], given["value"], call, given)


def here(given: dict[str, Any], choice: Choice, *, of_rows: bool = False) -> Tensor:
    """An attention that needs no other rank, of the arguments `given` to torch's function, by the chosen backend.

    Lossy ones compute attention of as many queries as keys alone, and `of_rows`, a rank's part of the queries, none:
    their scales are of the tokens at hand, and pictures would depend on the number of ranks."""
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v))
    if choice.is_lossy and (of_rows or q.shape[-2] != k.shape[-2]):
        return F.scaled_dot_product_attention(**given)
    if not choice.acts or learns or not (q.ndim == k.ndim == v.ndim == _DIMS and len(q) == len(k)):
        return F.scaled_dot_product_attention(**given)
    scale, is_causal = given.get("scale"), bool(given.get("is_causal"))
    return torch.ops.parafuse.attention(q, k, v, mask, scale, is_causal, choice.key)


def with_choice(forward: Forward, choice: Choice) -> Forward:
    """`forward`, whose attention calls run with the chosen backend."""
    if not choice.acts:
        return forward

    def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        return here(given, choice)

    def run(*args: Any, **kwargs: Any) -> Any:
        with AttentionMode(attend):
            return forward(*args, **kwargs)

    return run


class ChosenAttention:
    """The chosen backend for the attention calls of some modules, where no tokens are shared. No communication."""

    def __init__(self, modules: list[nn.Module], choice: Choice):
        self.modules, self.choice = modules, choice
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for module in self.modules:
            self._undo.append(override_forward(module, lambda original: with_choice(original, self.choice)))

    def remove(self) -> None:
        """Puts every forward back as it was."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


class ChoiceHolds(OnForward):
    """After the first call of a denoiser, raises UnsupportedError where the backend that was asked for computed none of
    its attention. The same on every rank."""

    def __init__(self, module: nn.Module, choice: Choice):
        super().__init__(module)
        self.choice = choice

    def _forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            why = self.choice.why_idle()
            if why:
                raise UnsupportedError(f"attention={self.choice.asked!r} on {type(self.module).__name__}: {why}")
            return result

        return forward


def run_on_rows(
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: tuple[SiteLayouts, ...],
    attention: SequenceAttention,
    ranks: SequenceGroup,
) -> tuple[Any, int]:
    """(result, number of attention calls) of a block on this rank's rows. Collective on the sequence group.

    Everything that varies is an argument, so that torch.compile makes one graph of it for all blocks of a kind."""

    calls, last = 0, None

    def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        nonlocal calls, last
        calls = site + 1
        if site >= len(sites):
            raise UnsupportedError("the block made more attention calls than when it was examined")
        queries, keys = (layout and _completed(layout, x) for layout, x in zip(sites[site], (q, k), strict=True))
        if queries is None or keys is None:
            of_rows = queries is not None
            return here(own_rows(ranks, queries, call, given), attention.choice, of_rows=of_rows)
        check_mask(call.mask, queries, keys)
        last = attention.in_order(q, k, v, queries, keys, call, last)
        return last

    with AttentionMode(attend):
        result = forward(*args, **kwargs)
    return result, calls


def _completed(layout: Layout, x: Tensor) -> Layout:
    """With as many kept rows as `x` (B, H, rows, D) has beside the split ones."""
    return layout if layout.kept is None else layout.with_kept(x.shape[2] - layout.local)


def own_rows(ranks: SequenceGroup, queries: Layout | None, call: Call, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an attention to keys that every rank has: of a mask over all queries, this rank's rows."""
    mask = call.mask
    if queries is None:
        return given
    if call.is_causal:
        raise UnsupportedError("causal attention from split tokens to tokens that every rank has")
    if mask is not None and mask.ndim > 1 and mask.shape[-2] == queries.total != 1:
        return given | {"attn_mask": ranks.take(mask, mask.ndim - 2, queries)}
    return given


def check_mask(mask: Tensor | None, queries: Layout, keys: Layout) -> None:
    """A mask must be over the whole sequence; one that the block cut or made from local lengths is refused."""
    if mask is None:
        return
    rows, columns = mask.shape[-2] if mask.ndim > 1 else 1, mask.shape[-1]
    # Sizes may be symbols, which torch.compile does not look for in a tuple.
    if not (columns == 1 or columns == keys.total) or not (rows == 1 or rows == queries.total):  # noqa: PLR1714
        raise UnsupportedError(
            f"attention mask of shape {tuple(mask.shape)} for {queries.total} queries and {keys.total} keys: "
            "the block makes its mask from the tokens it is given, so it cannot be split"
        )
