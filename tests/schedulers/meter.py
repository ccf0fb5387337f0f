"""A device that is not there: counts where a scheduler would make the host wait for a GPU, on real values.

Tensors made on the device "meta", or moved there, are `OnDevice`: they show that device and hold their values. Counted
is what brings a value to the host, and what sends one to the device, for which torch waits too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_any, tree_map_only

DEVICE = torch.device("meta")
READ, SENT = "read", "sent"
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item(), bool(), a tensor as an index
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten._linalg_check_errors.default,
}
"""Their result, or its shape, is known on the host."""


class OnDevice(Tensor):
    """A tensor of the device, whose values can be looked at here."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: Any = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of a HostMeter")


class HostMeter(TorchDispatchMode):
    """`waits`: how often the host waited, for values read and for values sent."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._made = _Made()

    def __enter__(self) -> Any:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on_device = tree_any(lambda x: isinstance(x, OnDevice), (args, kwargs))
        moved_to = kwargs.get("device")
        if func is aten.copy_.default:
            self._count_copy(source=args[1], is_to_device=isinstance(args[0], OnDevice))
        elif func is aten._to_copy.default:
            self._count_copy(source=args[0], is_to_device=on_device if moved_to is None else moved_to == DEVICE)
        elif on_device:
            self.waits[READ] += func in READS or (func is aten.index.Tensor and _has_mask(args[1]))
            _refuse_mixed(func, args)
        is_on_device = on_device if moved_to is None else torch.device(moved_to) == DEVICE
        here = kwargs | ({} if moved_to is None else {"device": "cpu"})
        held_args, held_kwargs = tree_map_only(OnDevice, lambda x: x.held, (args, here))
        given = func(*held_args, **held_kwargs)
        if not is_on_device:
            return given
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnDevice, given))

    def _count_copy(self, *, source: Any, is_to_device: bool) -> None:
        self.waits[READ] += isinstance(source, OnDevice) and not is_to_device
        self.waits[SENT] += is_to_device and not isinstance(source, OnDevice)


class _Made(TorchFunctionMode):
    """`torch.tensor` on the device makes its values on the host first, where no operator is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return func(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        return func(*args, **kwargs)


def _refuse_mixed(func: Any, args: Any) -> None:
    """Raises as a GPU does for tensors of both devices; numbers and indices of the host are taken."""
    if func is not aten.index.Tensor and tree_any(lambda x: type(x) is Tensor and x.dim() > 0, args):
        raise RuntimeError(f"{func}: tensors on the device and on the host")


def _has_mask(indices: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)
