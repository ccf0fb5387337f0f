"""Every operator of a run on fake weights: what it computes, what it moves, where. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from parafuse.engine.memory.fake_pipeline import weights
from parafuse.engine.memory.kernels import CudaAttention
from parafuse.engine.memory.ledger import EXCHANGE, Ledger, Span
from parafuse.engine.planning.facts import ATTENTION, CONVOLUTION, FUSED, GEMM, PRODUCTS, VIEW

aten = torch.ops.aten
ATTENTIONS = {
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
CONVOLUTIONS = {aten.convolution, aten._convolution}
NO_WORK = {aten.detach, aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}


@dataclass(slots=True)
class Seen:
    """One operator."""

    where: str
    family: str
    dtype: str
    flops: float
    bytes: float
    weights: float = 0.0
    columns: int = 0
    heads: int = 0
    tokens: int = 0
    keys: float = 0.0
    """Bytes of keys and values of an attention."""
    exchanges: bool = False
    """Whether ranks exchange something for it."""


class Recorder(Ledger):
    """A ledger that also writes down the operators. Not for several threads.

    Beside the operators themselves stands what is left of them where a compiler fuses all that lies between two
    products: what such a group reads from outside of it, and writes for others."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[Seen] = []
        self.where = ""
        self._weights: set[int] = set()
        self._group: Seen | None = None
        self._read: set[int] = set()
        self._made: dict[int, tuple[Seen, int]] = {}
        self._of_spans: dict[int, tuple[Span, list[Seen]]] = {}
        """By identity; a span stays as long as what it saw."""

    def know(self, module: nn.Module) -> None:
        super().know(module)
        self._weights |= {x.untyped_storage()._cdata for x in weights(module)}

    @contextmanager
    def recorded(self) -> Iterator[list[Seen]]:
        """A new list, in which what runs inside is written down."""
        before, self.seen = self.seen, []
        self._end_group()
        try:
            yield self.seen
        finally:
            self._end_group()
            self.seen = before

    @contextmanager
    def span(self) -> Iterator[Span]:
        with super().span() as one:
            before = len(self.seen)
            self._end_group()
            yield one
            self._end_group()
        self._of_spans[id(one)] = one, self.seen[before:]

    def again(self, span: Span) -> None:
        super().again(span)
        self._end_group()
        self.seen += self._of_spans[id(span)][1]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """One that did not come as an operator."""
        self._attend(q, k, v, out)

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        super()._record(func, args, kwargs, result)
        if self._is_silent:
            return
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if made and (given or math.prod(made[0].shape) > 1):
            self._see(func, args, kwargs, given, made, result)

    def _see(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], result: Any) -> None:
        packet = func._overloadpacket
        if packet in ATTENTIONS:
            self._attend(given[0], given[1], given[2], made[0])
            return
        keys = {_key(x) for x in given}
        first = made[0]
        in_place = _key(first) in keys and func._schema.is_mutable
        if packet in NO_WORK or (_key(first) in keys and not in_place):
            self._note(VIEW, first.dtype, 0.0, 0.0)
            return
        weights = sum(x.nbytes for x in given if _key(x) in self._weights)
        moved = float(sum(_nbytes(x) for x in given if _key(x) not in self._weights) + sum(map(_nbytes, made)))
        if packet in flop_registry:
            family = CONVOLUTION if packet in CONVOLUTIONS else GEMM
            flops = float(flop_registry[packet](*args, **kwargs, out_val=result))
            self._end_group()
            self._use(given)
            self._note(family, first.dtype, flops, moved, weights, int(first.shape[-1]))
            return
        self._note(packet.__name__, first.dtype, 0.0, moved + weights)
        self._fuse(given, made, weights)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        self._end_group()
        self._use([q, k, v])
        pairs = math.prod(q.shape[:-1]) * k.shape[-2]
        flops = 2.0 * pairs * (q.shape[-1] + v.shape[-1])
        moved = float(sum(_nbytes(x) for x in (q, k, v, out)))
        self._note(ATTENTION, q.dtype, flops, moved, 0.0, q.shape[-1])
        one = self.seen[-1]
        one.heads, one.tokens = int(q.shape[-3]), int(q.shape[-2])
        one.keys, one.exchanges = float(_nbytes(k) + _nbytes(v)), self.kind == EXCHANGE

    def _note(
        self, family: str, dtype: torch.dtype, flops: float, moved: float, weights: float = 0.0, columns: int = 0
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        self.seen.append(Seen(self.where, family, name, flops, moved, weights, columns))

    def _fuse(self, given: list[Tensor], made: list[Tensor], weights: float) -> None:
        group = self._group
        if group is None or group.where != self.where:
            self._end_group()
            group = self._group = Seen(self.where, FUSED, str(made[0].dtype).removeprefix("torch."), 0.0, 0.0)
            self.seen.append(group)
        for x in given:
            key = _key(x)
            producer = self._made.get(key)
            if (producer is not None and producer[0] is group) or key in self._read:
                continue
            self._read.add(key)
            group.bytes += _nbytes(x)
            self._written(key)
        for x in made:
            self._made[_key(x)] = (group, _nbytes(x))

    def _use(self, given: list[Tensor]) -> None:
        """A product reads these: what made them has to write them."""
        for x in given:
            self._written(_key(x))

    def _written(self, key: int) -> None:
        producer = self._made.pop(key, None)
        if producer is not None:
            producer[0].bytes += producer[1]

    def _end_group(self) -> None:
        self._group = None
        self._read.clear()

    def _gone(self, entry: Any) -> None:
        super()._gone(entry)
        self._made.pop(entry.key, None)


class Attending(CudaAttention):
    """Attention as a fused kernel, told to a recorder."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.recorder.seen)
        out = super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and not self.recorder._is_silent:
            seen = self.recorder.seen
            if any(one.family in PRODUCTS for one in seen[before:]):
                return out  # met again further inside
            del seen[before:]
            given: dict[str, Any] = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            self.recorder.attention(given["query"], given["key"], given["value"], out)
        return out


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _nbytes(x: Tensor) -> int:
    """That are read or written: of what is expanded, each once."""
    number = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) if x.numel() else 0
    return number * x.itemsize
