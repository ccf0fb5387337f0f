"""How a call is made with fewer text tokens: which arguments have a row for each, told by their sizes alone. That a way
is right is proven elsewhere (text.py); nothing here knows a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parafuse.parallel.branches import place_of

BUCKET = 16
"""Where the mask stays, text is kept up to a multiple of this: few shapes, and so few graphs."""
MAX_MASKS = 64
"""Whose lengths are kept in mind."""
Change = tuple[str, int]
"""What becomes of an argument: ("narrow", dim); ("first", dim) or ("last", dim) for one over text and image tokens, of
which the text is the first or the last; ("number", 0) for one that is the length itself."""


@dataclass(frozen=True)
class Valid:
    """What a mask says."""

    length: int
    """Up to the last token that is valid in any sample."""
    is_full: bool
    """All tokens up to there are valid in all samples."""


@dataclass(frozen=True)
class Text:
    """A text and its mask, by leaf number."""

    mask: int
    text: int
    length: int
    dim: int = 1
    """Of the text that runs over tokens."""
    offset: int = 0
    """Where its tokens start in the mask: that may be over text and image."""

    def kept(self, valid: Valid) -> int:
        """Tokens to keep."""
        if valid.is_full:
            return valid.length
        return min(self.length, -(-valid.length // BUCKET) * BUCKET)

    def is_cut(self, valid: Valid) -> bool:
        """Whether that are fewer than it has. A way that was found where they are not is none for where they are."""
        return self.kept(valid) < self.length


class Masks:
    """What masks say, looked up once for each tensor and each change of it: a look waits for the device."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor, Valid | None]] = {}
        self.looks = 0

    def __call__(self, mask: Tensor, offset: int, length: int) -> Valid | None:
        """Of its part over the text; None where it is no mask of zeros and ones, or leaves nothing."""
        place = place_of(mask)
        key = None if place is None else (place, mask.device, offset, length)
        if key in self._known:
            return self._known[key][1]
        self.looks += 1
        found = _look(mask, offset, length)
        if key is not None:
            if len(self._known) >= MAX_MASKS:
                self._known.clear()
            self._known[key] = (mask, found)  # alive, so that its place is its own
        return found


def _look(mask: Tensor, offset: int, length: int) -> Valid | None:
    values = mask.detach().to("cpu")
    if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
        return None
    part = values[:, offset : offset + length].bool()
    beside = torch.cat([values[:, :offset], values[:, offset + length :]], 1).bool()
    used = part.any(0).nonzero()
    if not len(used):
        return None
    last = int(used[-1]) + 1
    return Valid(last, bool(part[:, :last].all()) and bool(beside.all()))


def texts_of(leaves: list[Any], sample: Any) -> list[Text]:
    """Texts with a mask: the mask has (B, tokens), or (B, text and image tokens), the text (B, tokens, ...) or
    (B, layers, tokens, D)."""
    batch = len(sample) if isinstance(sample, Tensor) and sample.ndim else 0
    streams = [i for i, x in enumerate(leaves) if _is_stream(x, batch) and x is not sample]
    masks = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim == 2 and len(x) == batch]
    found: list[Text] = []
    for mask in masks:
        length = leaves[mask].shape[1]
        same = [(i, dim) for i in streams for dim in _dims(leaves[i], length)[:1]]
        rivals = [i for i in masks if leaves[i].shape[1] == length]
        if same and length > 1:
            text, dim = same[min(rivals.index(mask), len(same) - 1)]  # of one length: the first mask, the first text
            found.append(Text(mask, text, length, dim))
    if not found and isinstance(sample, Tensor) and sample.ndim == 3:  # one mask over text and image
        for mask in masks:
            length = leaves[mask].shape[1] - sample.shape[1]
            found += [Text(mask, i, length) for i in streams if 1 < length == leaves[i].shape[1]][:1]
    return found


def _is_stream(x: Any, batch: int) -> bool:
    return isinstance(x, Tensor) and x.ndim in (3, 4) and len(x) == batch and x.is_floating_point()


def _dims(x: Tensor, length: int) -> list[int]:
    """Dims that may run over tokens, but for the last one: that is of features."""
    return [dim for dim in range(1, x.ndim - 1) if x.shape[dim] == length]


def ways(leaves: list[Any], texts: list[Text], sample: Any) -> Iterator[dict[int, tuple[Change, Text]]]:
    """Ways to cut these texts: first with all that has as many rows, last the text and its mask alone."""
    base: dict[int, tuple[Change, Text]] = {}
    for one in texts:
        base[one.mask], base[one.text] = (("narrow", 1), one), (("narrow", one.dim), one)
    wide, first, last = dict(base), dict[int, tuple[Change, Text]](), dict[int, tuple[Change, Text]]()
    image = sample.shape[1] if isinstance(sample, Tensor) and sample.ndim == 3 else None
    for i, x in enumerate(leaves):
        for one in texts if i not in base and x is not sample else ():
            change, joint = _change(x, one.length), _change(x, one.length + image) if image else None
            if change is not None:
                wide.setdefault(i, (change, one))
            elif joint is not None and joint[0] == "narrow":
                first[i], last[i] = (("first", joint[1]), one), (("last", joint[1]), one)
    plain = {i: x for i, x in wide.items() if x[0][0] != "number"}
    seen: list[dict[int, tuple[Change, Text]]] = []
    for way in ({**wide, **first}, {**wide, **last}, wide, plain, base):
        if way not in seen:
            seen.append(way)
            yield way


def _change(x: Any, length: int) -> Change | None:
    if isinstance(x, int) and not isinstance(x, bool) and x == length:
        return ("number", 0)
    if not isinstance(x, Tensor) or not 2 <= x.ndim <= 4:
        return None
    return next((("narrow", dim) for dim in (0, 1) if x.shape[dim] == length), None)


def shortened(leaves: list[Any], way: dict[int, tuple[Change, Text]], kept: dict[int, int]) -> list[Any]:
    """The leaves with fewer text tokens. `kept`: by mask."""
    out = list(leaves)
    for i, ((kind, dim), text) in way.items():
        left, x = kept[text.mask], leaves[i]
        if kind == "number":
            out[i] = left
        elif i == text.mask and x.shape[1] != text.length:  # the image's part stays
            parts = [x[:, : text.offset + left], x[:, text.offset + text.length :]]
            out[i] = torch.cat(parts, 1)
        elif kind in ("first", "last"):
            rest = x.shape[dim] - text.length
            before = 0 if kind == "first" else rest
            text_part, after = x.narrow(dim, before, left), x.narrow(dim, before + text.length, rest - before)
            out[i] = torch.cat([x.narrow(dim, 0, before), text_part, after], dim)
        else:
            out[i] = x.narrow(dim, 0, left)
    return out


def disturbed(leaves: list[Any], texts: list[Text], kept: dict[int, int]) -> list[Any]:
    """The leaves with noise in the place of the text tokens that would be cut."""
    out = list(leaves)
    for one in texts:
        x = leaves[one.text]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        loud = 4 * noise * x.detach().std().clamp_min(1e-3) + 0.5
        left = kept[one.mask]
        kept_part, lost = x.narrow(one.dim, 0, left), loud.narrow(one.dim, left, one.length - left)
        out[one.text] = torch.cat([kept_part, lost], one.dim)
    return out
