"""An autoencoder whose `decode` and `encode` run undivided over several ranks, each with a slab of rows.

The latents are cut where the method is entered, along height or width (the longer one) of pictures and videos and
along time of audio. The autoencoder's own code runs on `Slab` tensors, and the result is made whole on every rank. No
class is known by name: what an operator needs from other ranks is the operator's affair (`parallel/slab_rules.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves, tree_map

from parafuse.errors import ConfigError, UnsupportedError
from parafuse.parallel.hooks import override
from parafuse.parallel.part_state import Snapshot
from parafuse.parallel.placeholder import settled
from parafuse.parallel.slab import Slab, SlabRanks, refuse
from parafuse.parallel.slab_blank import Blank, Blanks
from parafuse.parallel.slab_trial import refusal

METHODS = ("decode", "encode")
Method = Callable[..., Any]


def split_dim(x: Tensor) -> int:
    """The dim along which latents or samples are cut: the longer of height and width (height of a square), time of
    audio (samples, or channels and samples). Never the frames of a video: decoders keep features of them."""
    if x.ndim <= 3:
        return x.ndim - 1
    return x.ndim - 2 if x.shape[-2] >= x.shape[-1] else x.ndim - 1


class ShardedAutoencoder:
    """`decode` and `encode` of one autoencoder over the ranks of a group. Every rank calls them with the same
    arguments and gets the whole result."""

    def __init__(self, name: str, module: nn.Module, ranks: ProcessGroup):
        self.name, self.module, self.ranks = name, module, SlabRanks(ranks)
        self._undo: list[Callable[[], None]] = []
        self._is_inside = False
        self._seen: dict[str, str] = {}
        self._tried: set[tuple[Any, ...]] = set()
        """Methods and shapes that were seen to have no operator in the way."""

    def install(self) -> None:
        for name in METHODS:
            if callable(getattr(self.module, name, None)):
                self._undo.append(override(self.module, name, self._over(name, getattr(self.module, name))))
        if not self._undo:
            raise UnsupportedError(f"{self.name}: {type(self.module).__name__} has neither decode nor encode to split.")

    def remove(self) -> None:
        """Puts back what stood there. No communication."""
        while self._undo:
            self._undo.pop()()

    def lines(self) -> list[str]:
        """For a receipt: what is split and how."""
        methods = [name for name in METHODS if callable(getattr(self.module, name, None))]
        seen = [f"{self.name}: {name} split {how}" for name, how in self._seen.items()]
        return [f"{self.name}: {' and '.join(methods)} undivided over {self.ranks.degree} ranks (exact)", *seen]

    def _over(self, name: str, original: Method) -> Method:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside or self.ranks.degree == 1:
                return original(*args, **kwargs)
            self._is_inside = True
            try:
                with torch.no_grad():
                    if getattr(self.module, "use_tiling", False):
                        self._seen[name] = "into no tiles: each was too small, or enters no part of the autoencoder"
                        with self._tile_by_tile(name):
                            return original(*args, **kwargs)
                    return self._split(name, original, args, kwargs)
            finally:
                self._is_inside = False

        return run

    def _split(self, name: str, original: Method, args: Any, kwargs: Any) -> Any:
        """Runs on a slab of the first tensor among the arguments."""
        args, kwargs = settled(args), settled(kwargs)
        place, whole = _first_tensor(args, kwargs)
        if whole is None:
            return original(*args, **kwargs)
        if whole.requires_grad:
            raise UnsupportedError(f"{self.name}.{name}: gradients do not pass a split autoencoder; detach its input.")
        dim = split_dim(whole)
        if whole.shape[dim] < self.ranks.degree:
            raise ConfigError(
                f"{self.name}.{name}: an input of {whole.shape[dim]} rows along its longest spatial dim cannot be "
                f'split over {self.ranks.degree} ranks; use fewer ranks, or vae="replicated".'
            )
        key = (name, whole.shape, whole.dtype)
        if key not in self._tried:
            self._try(lambda given, ranks: _run(original, given[0], given[1], place, dim, ranks), (args, kwargs))
            self._tried.add(key)
        self._seen[name] = f"along dim {dim} of {tuple(whole.shape)}"
        del whole
        return _run(original, args, kwargs, place, dim, self.ranks)

    def _try(self, run: Callable[[Any, SlabRanks], Any], given: Any) -> None:
        """Raises UnsupportedError, on all ranks, where one of them would. Collective: one small exchange."""
        before = Snapshot(self.module)
        try:
            found = refusal(run, given, self.ranks)
        finally:
            before.restore()
        if self.ranks.sum(torch.tensor(float(found is not None), device=_device_of(given))).item():
            raise found or UnsupportedError(f"{self.name}: another rank cannot run it on tensors that are split.")

    @contextmanager
    def _tile_by_tile(self, name: str) -> Iterator[None]:
        """While diffusers makes tiles: each tile is split, where a part of the autoencoder is entered with it."""
        with ExitStack() as stack:
            for child in self.module.children():
                if any(True for _ in child.children()):  # not a single convolution beside the others
                    stack.callback(override(child, "forward", self._over_tile(name, child.forward)))
            yield

    def _over_tile(self, name: str, original: Method) -> Method:
        def run(*args: Any, **kwargs: Any) -> Any:
            _, tile = _first_tensor(args, kwargs)
            if tile is None or tile.shape[split_dim(tile)] < self.ranks.degree:
                return original(*args, **kwargs)  # a tile at the edge that is too small to split: on every rank
            return self._split(name, original, args, kwargs)

        return run


def _run(original: Method, args: Any, kwargs: Any, place: int | str, dim: int, ranks: SlabRanks) -> Any:
    """The method on a slab in the place of the tensor that is there. Collective on `ranks`."""
    slab = Slab.of(args[place] if isinstance(place, int) else kwargs[place], dim, ranks)
    if isinstance(place, int):
        args = (*args[:place], slab, *args[place + 1 :])
    else:
        kwargs = kwargs | {place: slab}
    with Blanks(), _compiled_parts_named():
        result = original(*args, **kwargs)
    return made_whole(result)


def _device_of(tree: Any) -> torch.device:
    return next(x.device for x in tree_leaves(tree) if isinstance(x, Tensor))


@contextmanager
def _compiled_parts_named() -> Iterator[None]:
    """A refusal inside of compiled code (flex attention compiles itself) comes out as a refusal, with its operator."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "torch._dynamo.exc":
            raise
        found = re.search(r"torch\.ops\.[\w.]+", str(error))
        raise refuse(found[0] if found else "torch.compile", "in compiled code") from error


def _first_tensor(args: Any, kwargs: Any) -> tuple[int | str, Tensor | None]:
    """The first argument that is a tensor of samples, and its position or keyword."""
    for place, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor) and not isinstance(value, Slab) and value.ndim >= 2:
            return place, value
    return 0, None


def made_whole(tree: Any) -> Any:
    """The same nest, also of objects that hold tensors (a distribution), with every slab made whole. Collective."""
    return tree_map(_leaf_made_whole, tree)


def _leaf_made_whole(leaf: Any) -> Any:
    if isinstance(leaf, Slab):
        return leaf.whole()
    if isinstance(leaf, Blank):
        return leaf.plain()
    if not isinstance(leaf, (Tensor, nn.Module)) and hasattr(leaf, "__dict__"):
        for name, value in vars(leaf).items():
            if isinstance(value, Slab):
                setattr(leaf, name, value.whole())
    return leaf
