"""Timesteps on the host, for schedulers that look their coefficients up: no wait for the device in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any

from torch import Tensor

LOOKED_UP = frozenset(
    "CogVideoXDDIMScheduler CogVideoXDPMScheduler DDIMInverseScheduler DDIMParallelScheduler DDIMScheduler "
    "DDPMParallelScheduler DDPMScheduler PNDMScheduler TCDScheduler UnCLIPScheduler".split()
)
"""Schedulers whose `step` takes nothing from a timestep but places in a table (`alphas_cumprod`, which is on the host),
so that results are bitwise the same wherever the timestep is. Where it enters a product with the sample (LCM) they are
not, in bf16: a number of the host is not rounded to bf16 first."""
_METHODS = ("scale_model_input", "step")
_KEPT = "_parafuse_host_times"


@contextmanager
def host_times(target: Any) -> Iterator[bool]:
    """While it is open, the scheduler of a pipeline (or `target` itself) sees its timesteps on the host in `step`.

    A timestep on a GPU costs `step` 2 to 13 waits for all that was launched, in every step; this costs one per request.
    The pipeline and the model still get timesteps on the device. Local. Gives whether anything was done: not for other
    schedulers than `LOOKED_UP`, nor where their methods are replaced on the instance already."""
    scheduler = getattr(target, "scheduler", target)
    own: dict[str, Any] = vars(scheduler) if type(scheduler).__name__ in LOOKED_UP else {}
    if not own or any(name in own for name in _METHODS):
        yield False
        return
    put_on = {name: MethodType(_on_host(type(scheduler), name), scheduler) for name in _METHODS}
    own.update(put_on)
    try:
        yield True
    finally:
        for name, method in put_on.items():
            if own.get(name) is method:
                del own[name]
        own.pop(_KEPT, None)


@cache
def _on_host(cls: type, name: str) -> Any:
    """The class's method with timesteps on the host. A function of the instance: a copy of a scheduler has its own."""
    method = getattr(cls, name)

    @wraps(method)  # pipelines look at its arguments
    def on_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        there = self.timesteps
        if not isinstance(there, Tensor) or there.device.type == "cpu":
            return method(self, *args, **kwargs)
        seen = vars(self).get(_KEPT)
        if seen is None or seen[0] is not there:
            seen = vars(self)[_KEPT] = (there, there.to("cpu"))
        here = seen[1]

        def moved(value: Any) -> Any:
            is_time = isinstance(value, Tensor) and value.dim() == 0 and _share(value, there)
            return here[value.storage_offset() - there.storage_offset()] if is_time else value

        self.timesteps = here
        try:
            return method(self, *map(moved, args), **{key: moved(value) for key, value in kwargs.items()})
        finally:
            self.timesteps = there

    return on_host


def _share(one: Tensor, other: Tensor) -> bool:
    """A timestep of a schedule is a view into it; its place tells its value without a look at the device."""
    same: bool = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and one.dtype == other.dtype and other.stride() == (1,) and one.device == other.device
