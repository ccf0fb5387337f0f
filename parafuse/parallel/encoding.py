"""A text encoder on one rank of several: the others get what it gives; and results of repeated calls are kept.

A result is taken apart into tensors and a pickle of all else, whatever class it has, so that it is made anew on another
rank, or later, with tensors of its own.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from parafuse.config import Axis
from parafuse.errors import RankError
from parafuse.parallel.comm import broadcast
from parafuse.parallel.held import Held
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.mesh import Mesh

METHODS = ("forward", "generate", "get_text_features")
"""By which pipelines call text encoders."""
RANDOM = ("generate",)
"""Those whose result the arguments alone do not tell."""
ALIGNED = 16
"""Bytes: a tensor begins at a multiple of it in what is sent."""


@dataclass
class Apart:
    """A result, taken apart."""

    rest: bytes
    tensors: list[Tensor]


class TextEncoder:
    """What stands on a text encoder. With an owner its calls are collective: every rank of the mesh makes them,
    and gets what the owner has computed or kept; what is kept is decided there alone.

    Nested calls (`generate` calls `forward`) are the encoder's own."""

    def __init__(self, module: nn.Module, mesh: Mesh, *, owner: int | None, kept: int):
        """`owner`: the rank that computes, counted within the mesh; None: each rank for itself."""
        self.module = module
        self.seen: Counter[str] = Counter()
        """Calls: computed here, got from another rank, or kept from an earlier one."""
        self.owner = None if mesh.num_ranks == 1 else owner
        self._mesh, self._kept = mesh, kept
        self._place = _coordinates(mesh, owner or 0)
        self._results: OrderedDict[tuple[str, str], Apart] = OrderedDict()
        self.inside = False
        """Whether this rank computes now."""
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        """Of what is computed here."""
        self._held = Held(module)
        self._versions = self._weights()
        self._undo: list[Callable[[], None]] = []

    @property
    def is_owner(self) -> bool:
        """Whether this rank computes."""
        return self.owner is None or all(self._mesh.rank(axis) == at for axis, at in self._place.items())

    def install(self) -> None:
        for name in METHODS:
            if name == "forward":
                self._undo.append(override_forward(self.module, lambda original: self._shared("forward", original)))
            elif callable(getattr(self.module, name, None)):
                self._undo.append(override(self.module, name, self._shared(name, getattr(self.module, name))))
        self._held = Held(self.module)

    def remove(self) -> None:
        """Puts back what stood there, and drops what was kept. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._results.clear()

    def begin(self) -> None:
        """At the start of a request: counts anew."""
        self.seen.clear()
        self._look()

    def forget(self) -> None:
        """Drops what was kept: weights are others."""
        self._results.clear()

    def _look(self) -> None:
        """Forgets what another encoder gave, where adapters or weights are others by now."""
        if not self._kept:
            return
        versions = self._weights()
        if versions != self._versions or not self._is_as_it_was:
            self.forget()
            self._held, self._versions = Held(self.module), versions

    @property
    def _is_as_it_was(self) -> bool:
        """But for the values of weights."""
        return self._held.is_same(exactly=True, wherever=self._come_and_go)

    @property
    def _come_and_go(self) -> bool:
        """Weights do; who brings them tells of changes (`forget`)."""
        return self.around is not nullcontext

    def _weights(self) -> list[tuple[int, int]]:
        """Which they are, or where, and how often each was written in place."""
        return [(id(p) if self._come_and_go else p.data_ptr(), p._version) for p in self.module.parameters()]

    def _shared(self, name: str, original: Forward) -> Forward:
        def shared(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return original(*args, **kwargs)
            device = _device(args, kwargs)
            if not self.is_owner:
                self.seen["received"] += 1
                return self._received(device)
            try:
                key = self._key(name, args, kwargs)
                is_kept = key in self._results
                result = self._again(key, device) if is_kept else self._own(original, args, kwargs)
                found = take_apart(result) if self.owner is not None or key is not None else None
            except Exception as error:
                if self.owner is not None:
                    self._send(Apart(f"{type(error).__name__}: {error}".encode(), []), device, failed=True)
                raise
            if found is not None and self.owner is not None:
                self._send(found, device)
            if found is not None and key is not None and not is_kept:
                self._keep(key, found)
            return result

        return shared

    def _again(self, key: Any, device: torch.device) -> Any:
        self.seen["kept"] += 1
        self._results.move_to_end(key)
        return _whole(self._results[key], device)

    def _keep(self, key: tuple[str, str], found: Apart) -> None:
        self._results[key] = Apart(found.rest, [x.detach().to("cpu", copy=True) for x in found.tensors])
        while len(self._results) > self._kept:
            self._results.popitem(last=False)

    def _key(self, name: str, args: Any, kwargs: Any) -> tuple[str, str] | None:
        """Equal for calls that give the same; None where nothing is kept: adapters are scaled for this call, say."""
        if self._kept and self._weights() != self._versions:
            self._look()
        if not self._kept or name in RANDOM or self._held.unknown or not self._is_as_it_was:
            return None
        leaves, spec = tree_flatten((args, kwargs))
        found = hashlib.sha256(f"{spec}{torch.is_autocast_enabled('cpu')}{torch.is_autocast_enabled('cuda')}".encode())
        for x in leaves:
            if isinstance(x, Tensor):
                found.update(f"{x.dtype}{tuple(x.shape)}{x.device}".encode())
                values: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                found.update(values)
            elif x is None or isinstance(x, (bool, int, float, str, torch.dtype)):
                found.update(repr(x).encode())
            else:
                return None
        return name, found.hexdigest()

    def _own(self, original: Forward, args: Any, kwargs: Any) -> Any:
        self.seen["computed"] += 1
        self.inside = True
        try:
            with self.around():
                return original(*args, **kwargs)
        finally:
            self.inside = False

    def _send(self, found: Apart, device: torch.device, *, failed: bool = False) -> None:
        sizes = [x.nbytes for x in found.tensors]
        facts = [(x.dtype, tuple(x.shape)) for x in found.tensors]
        head = pickle.dumps((found.rest, facts))
        flat = torch.zeros(_up(len(head)) + sum(map(_up, sizes)), dtype=torch.uint8, device=device)
        flat[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(device)
        offset = _up(len(head))
        for x, size in zip(found.tensors, sizes, strict=True):
            flat[offset : offset + size] = x.detach().contiguous().reshape(-1).view(torch.uint8)
            offset += _up(size)
        self._broadcast(torch.tensor([len(head), flat.numel(), int(failed)], device=device))
        self._broadcast(flat)

    def _received(self, device: torch.device) -> Any:
        sizes = torch.zeros(3, dtype=torch.int64, device=device)
        self._broadcast(sizes)
        length, whole, failed = sizes.tolist()
        flat = torch.empty(whole, dtype=torch.uint8, device=device)
        self._broadcast(flat)
        rest, facts = pickle.loads(flat[:length].cpu().numpy().tobytes())
        if failed:
            raise RankError(f"{type(self.module).__name__}: failed on the rank that has it: {rest.decode()}")
        offset, tensors = _up(length), list[Tensor]()
        for dtype, shape in facts:
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(flat[offset : offset + size].clone().view(dtype).view(shape))
            offset += _up(size)
        return _whole(Apart(rest, tensors), device, copy=False)

    def _broadcast(self, x: Tensor) -> None:
        """From the owner to all ranks of the mesh: axis by axis, from those that have it to those beside them."""
        axes = list(self._place)
        for i, axis in enumerate(axes):
            if all(self._mesh.rank(later) == self._place[later] for later in axes[i + 1 :]):
                broadcast(x, self._place[axis], self._mesh.group_name(axis)).wait()

    def line(self, name: str) -> str:
        """For receipts."""
        words = [] if self.owner is None else [f"on rank {self.owner} alone"]
        words += [f"keeps {self._kept} results"] if self._kept else []
        return f"{name}: {', '.join(words)}"


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _coordinates(mesh: Mesh, rank: int) -> Mapping[Axis, int]:
    """Of a rank of the mesh, along the axes that have more than one."""
    found: dict[Axis, int] = {}
    for axis in reversed([axis for axis in Axis if mesh.degree(axis) > 1]):
        rank, found[axis] = divmod(rank, mesh.degree(axis))
    return found


def spread(sizes: list[int], num_ranks: int) -> list[int]:
    """For each text encoder of so many bytes the rank that has it: the largest first, each to the rank with the least.
    The same on every rank."""
    loads, owners = [0] * num_ranks, [0] * len(sizes)
    for which in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[which] = loads.index(min(loads))
        loads[owners[which]] += sizes[which]
    return owners


def take_apart(result: Any) -> Apart:
    """A result of any class. Raises what its parts raise when they are pickled."""
    text, tensors = io.BytesIO(), list[Tensor]()

    class Taking(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Tensor):
                return None
            tensors.append(obj)
            return len(tensors) - 1

    Taking(text, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    return Apart(text.getvalue(), tensors)


def _whole(found: Apart, device: torch.device, *, copy: bool = True) -> Any:
    """The result anew; with `copy` its tensors are its own."""
    tensors = [x.to(device, copy=True) if copy else x for x in found.tensors]

    class Giving(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Tensor:
            return tensors[pid]

    return Giving(io.BytesIO(found.rest)).load()


def _device(args: Any, kwargs: Any) -> torch.device:
    """Where a call's tensors are."""
    leaves, _ = tree_flatten((args, kwargs))
    return next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
