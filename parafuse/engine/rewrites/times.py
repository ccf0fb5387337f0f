"""What a denoiser will be given as its timestep in the steps to come: the scheduler's timesteps in the forms that the
pipeline may give them in, told by those that were given so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def _forms(scheduler: Any, like: Tensor) -> Iterator[Tensor]:
    """(steps,) in the dtype and on the device of `like`, as pipelines make timesteps of a schedule. On the device where
    they do it: a GPU divides by a number in another way than a CPU."""
    given = scheduler.timesteps
    total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
    sigmas = getattr(scheduler, "sigmas", None)
    bases = [given.to(like.device), given.to(like.device, like.dtype)]
    for values in bases if given.device == like.device else [*bases, given]:
        yield values
        for scale in dict.fromkeys((total, 1000)):
            yield values / scale
            yield values * (1 / scale)
            yield 1 - values / scale
            yield (scale - values) / scale
        yield 1 - values
    if isinstance(sigmas, Tensor) and sigmas.ndim == 1:
        yield sigmas
        yield 1 - sigmas


def foreseen(schedulers: Iterable[Any], given: list[Tensor]) -> Tensor | None:
    """(values,) what may be given, each once: of all forms that have what was given so far (tensors of one value), for
    those that agree in the first steps may part later by a rounding. None where no form has it. Waits for the device.
    """
    like = given[-1]
    seen = set(torch.stack([x.reshape(-1)[0] for x in given]).tolist())
    found: dict[float, None] = {}
    for scheduler in schedulers:
        if not isinstance(getattr(scheduler, "timesteps", None), Tensor):
            continue
        forms = [form.to(like.device, like.dtype) for form in _forms(scheduler, like)]
        at_hand = torch.cat(forms).tolist()  # one look for all
        for form in forms:
            values, at_hand = at_hand[: len(form)], at_hand[len(form) :]
            if seen <= set(values):
                found |= dict.fromkeys(values)
    return torch.tensor(list(found), dtype=like.dtype, device=like.device) if found else None


def is_one_value(x: Any) -> bool:
    """Whether a tensor may be a timestep: a number, or the same number for each sample. Waits for the device."""
    return isinstance(x, Tensor) and x.ndim <= 1 and x.numel() > 0 and bool((x == x.reshape(-1)[0]).all())
