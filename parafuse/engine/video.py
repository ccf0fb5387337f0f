"""Sparse attention on a denoiser: what its video is, found out from its calls, and which step a call belongs to."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from parafuse.engine.caches.clock import Clock
from parafuse.engine.grid import VideoStream, video_stream
from parafuse.errors import UnsupportedError
from parafuse.log import note
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.sequence import SequenceParallel
from parafuse.parallel.sparse import SparseAttention, Video

MOST_SIZES = 64
"""Of calls, whose video is kept."""
TABLE_DIMS, TABLE_WIDTHS = (2, 3, 4), (2, 3, 4)
"""Of tables of positions: (S, 3), (B, S, 3), (B, 3, S, 2)."""


def _size(x: Any) -> Any:
    """What of an argument decides the grid, beside values of tables."""
    if isinstance(x, Tensor):
        return tuple(x.shape)
    return x if isinstance(x, int) else type(x).__name__


def _same(kept: Tensor, x: Tensor) -> bool:
    return kept.shape == x.shape and kept.device == x.device and bool(torch.equal(kept, x))


class SparseVideo(OnForward):
    """Stands on a denoiser outside of what splits its tokens, inside of what shares its calls. Every rank of the
    sequence finds the same, from the same arguments; where heads differ they meet once a call."""

    def __init__(self, sequence: SequenceParallel, attention: SparseAttention, clock: Clock, context: CallContext):
        super().__init__(sequence.root)
        self.sequence, self.attention, self.clock, self.context = sequence, attention, clock, context
        self.streams: dict[Any, VideoStream] = {}
        """By the shapes of a call."""
        self._known_tables: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self._calls = 0
        self._has_met = False
        """Whether an attention over the video was seen: calls in which a cache skips all say nothing."""

    def _forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = self._stream(args, kwargs)
            self.attention.begin_call(self._video(stream), self._step())
            if self.context.is_trial:
                with self.attention.uncounted():
                    return original(*args, **kwargs)
            result = original(*args, **kwargs)
            self._has_met |= self.attention.layer > 0
            if not self._has_met:
                self._refuse(stream)
            self.attention.end_call()
            return result

        return forward

    def _step(self) -> int:
        """Of the request; of a model that is called by hand, which has no scheduler, the number of the call."""
        if self.clock.counts:
            self.clock.look()
            return self.clock.step
        number, self._calls = self._calls, self._calls + (not self.context.is_trial)
        return number

    def settle(self) -> None:
        """At the end of a request: a line where nothing was left out."""
        counts = self.attention.counts
        if counts and not counts["sparse"]:
            why = ", ".join(f"{name} ({number} calls)" for name, number in counts.items() if number)
            note(f"sparse={self.attention.sparse.brief} left nothing out in this request: {why}; see dense_steps")

    def begin(self) -> None:
        """A request begins."""
        self._calls = 0
        self.attention.begin()

    def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoStream:
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), *map(_size, leaves), *self._tables(leaves))
        if key not in self.streams:
            found = video_stream(self.module, args, kwargs, self.attention.sparse.grid_shape)
            if not any(found.grid == one.grid for one in self.streams.values()):
                grid = " x ".join(map(str, found.grid))
                note(f"sparse attention: a video of {grid} frames, rows and columns ({found.source})")
            self.streams = {**self.streams, key: found} if len(self.streams) < MOST_SIZES else {key: found}
        return self.streams[key]

    def _tables(self, leaves: list[Any]) -> list[int]:
        """A number for each tensor that may be a table of positions: the same for equal values. Calls of one size may
        have pictures of other proportions. Tables come as the same objects in every step, and are compared once."""
        numbers: list[int] = []
        for x in leaves[1:]:  # the first one is what is denoised
            if not isinstance(x, Tensor) or x.ndim not in TABLE_DIMS or x.shape[-1] not in TABLE_WIDTHS:
                continue
            known = next((i for i, (ref, _) in enumerate(self._known_tables) if ref() is x), None)
            if known is None:
                known = next((i for i, (_, kept) in enumerate(self._known_tables) if _same(kept, x)), None)
                if known is None:
                    if len(self._known_tables) >= MOST_SIZES:
                        self._known_tables.clear()
                        self.streams = {}
                    known = len(self._known_tables)
                    self._known_tables.append((weakref.ref(x), x.detach().clone()))
                else:
                    self._known_tables[known] = weakref.ref(x), self._known_tables[known][1]
            numbers.append(known)
        return numbers

    def _video(self, stream: VideoStream) -> Video:
        return Video(stream.grid, stream.first, stream.total, stream.name, lambda number: self._place(stream, number))

    def _place(self, stream: VideoStream, number: int) -> tuple[int, int] | None:
        """Of so many segments of an attention the first and the last that the video is in, where several are as long:
        as in the first block, whose plan names them."""
        for key, plan in self.sequence.plans.items():
            if key[0] != self.sequence.kind_of(stream.block) or stream.leaf not in plan.arguments:
                continue
            atoms = plan.arguments[stream.leaf].atoms
            for site in plan.sites:
                if site.queries is not None and site.keys == site.queries and len(site.queries) == number:
                    places = [i for i, atom in enumerate(site.queries) if atom in atoms]
                    if places and places == list(range(places[0], places[-1] + 1)):
                        return places[0], places[-1]
        return None

    def _refuse(self, stream: VideoStream) -> None:
        raise UnsupportedError(
            f"{type(self.module).__name__}: sparse={str(self.attention.sparse)!r}: none of its attentions is over the "
            f"{stream.length} tokens of its video ({stream.name} of its first block); leave sparse out for this model."
        )
