"""Denoisers and pipelines that a simple rule would get wrong: shared where that is right, computed by all where not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import parafuse
from tests.dist.ranks import run_ranks
from tests.dist.test_guidance import CFG, D, Denoiser, stacked, two_calls, values
from tests.dist.test_sequence import EXACT
from tests.models import error


class Coupled(Denoiser):
    """Samples that see each other, as with normalisation over the batch."""

    def forward(self, x: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x - x.mean(0), text)


class Filling(Denoiser):
    """Keeps the text of its first call in every request, and reads it in later ones."""

    def forward(self, x: Tensor, text: Tensor, cache: dict[str, Tensor] | None = None) -> Any:  # type: ignore[override]
        if cache is None:
            self.kept = getattr(self, "kept", 0) + text.sum()
            return super().forward(x, text + self.kept)
        return super().forward(x, cache.setdefault("text", text))


class Opaque(Denoiser):
    """Gives an object of its own."""

    def forward(self, x: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return SimpleNamespace(sample=super().forward(x, text)[0])


class Sized(Denoiser):
    """Takes height and width in one tensor, which has as many values as there are samples."""

    def forward(self, x: Tensor, text: Tensor, size: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * size.repeat(D // 2), text)


class Transposed(Denoiser):
    """Samples along the second dim of its states, and results whose rows are not contiguous."""

    def forward(self, x: Tensor, states: Tensor) -> Any:  # type: ignore[override]
        found = super().forward(x, states.mean(0))
        return (found[0].transpose(1, 2).contiguous().transpose(1, 2), found[1])


class Counting(Denoiser):
    """Is told the step as a number, which differs in each."""

    def forward(self, x: Tensor, text: Tensor, step: int) -> Any:  # type: ignore[override]
        return super().forward(x * (1 + step), text)


class Noisy(Denoiser):
    """Draws from torch's own generator."""

    def forward(self, x: Tensor, text: Tensor, table: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(x + torch.randn_like(x), text)


class Framed(Denoiser):
    """Has a text for each of three frames of every sample."""

    def forward(self, x: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, text.unflatten(0, (-1, 3)).mean(1))


class Mixing(Denoiser):
    """Has a part that can be another one, as attention processors can."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = Apart()

    def forward(self, x: Tensor, text: Tensor, table: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(self.processor(x), text)


class Apart:
    def __call__(self, x: Tensor) -> Tensor:
        return x


class Together(Apart):
    def __call__(self, x: Tensor) -> Tensor:
        return x - x[:1]


def noisy(model: Any) -> Tensor:
    torch.manual_seed(3)
    return torch.cat([two_calls(model, 3).expand(6, -1, -1), stacked(model)])


def framed(model: Any) -> Tensor:
    x, a, b = values(2)
    for _ in range(3):
        uncond, cond = model(torch.cat([x, x]), torch.cat([b, a]).repeat_interleave(3, 0))[0].chunk(2)
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
    return x + 0


def mixing(model: Any) -> Tensor:
    model.processor = Apart()
    first = stacked(model)
    model.processor = Together()
    return torch.cat([first, stacked(model)])


def three_samples(model: Any) -> Tensor:
    """Each branch whole on a rank is less than two of three samples on one."""
    x, a, b = values(3)
    for _ in range(3):
        cond, uncond = model(x, a)[0], model(x, b)[0]
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
    return x + 0


class TakenApart(Denoiser):
    """Takes the batch for three branches on top of each other, as perturbed-attention guidance does."""

    def forward(self, x: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        uncond, cond, perturbed = x.chunk(3)
        return super().forward(torch.cat([uncond, cond, perturbed.mean(1, keepdim=True).expand_as(perturbed)]), text)


def taken_apart(model: Any) -> Tensor:
    x, a, b = values(2)
    for _ in range(3):
        uncond, cond, perturbed = model(torch.cat([x] * 3), torch.cat([b, a, a]))[0].chunk(3)
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond) + cond - perturbed)
    return x + 0


def coupled(model: Any) -> Tensor:
    x, a, b = values(2)
    for _ in range(4):
        uncond, cond = model(x, a)[0], model(x, b)[0]
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
    return x + 0


def filling(model: Any) -> Tensor:
    x, a, b = values()
    caches: list[dict[str, Tensor]] = [{}, {}]
    for _ in range(3):
        cond, uncond = model(x, a, cache=caches[0])[0], model(x, b, cache=caches[1])[0]
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond) + model(x, a)[0])
    model.kept = 0
    return x + 0


def opaque(model: Any) -> Tensor:
    x, a, b = values()
    for _ in range(3):
        x = x - 0.1 * (model(x, a).sample + model(x, b).sample)
    return x + 0


def sized(model: Any) -> Tensor:
    x, a, _ = values(2)
    for size in ([2.0, 2.0], [2.0, 2.0], [2.0, 3.0]):
        x = x - 0.1 * model(x, a, size=torch.tensor(size))[0]
    return x + 0


def transposed(model: Any) -> Tensor:
    x, a, b = values(2)
    for _ in range(3):
        pair = model(x, torch.stack([a, b, a]))[0]
        x = x - 0.1 * pair.transpose(1, 2).view(2, -1).view(2, D, 4).transpose(1, 2)
    x, a, b = values()
    for _ in range(3):
        cond, uncond = (model(x, text[None])[0].transpose(1, 2).view(1, -1) for text in (a, b))
        x = x - 0.1 * (cond - 0.5 * uncond).view(1, D, 4).transpose(1, 2)
    return x + 0


def counting(model: Any) -> Tensor:
    x, a, b = values()
    for step in range(6):
        x = x - 0.1 * (model(x, a, step=step)[0] - 0.5 * model(x, b, step=step)[0])
    return x + 0


def written_into(model: Any) -> Tensor:
    """A copy is kept, then the result is written into."""
    x, a, b = values()
    for _ in range(3):
        cond = model(x, a)[0]
        saved, part = cond.clone(), cond[:, 0] * 2
        cond[:, :1] = 0
        cond.mul_(2)
        x = x - 0.1 * (model(x, b)[0] + cond + 0.5 * saved + part.to(x.device, x.dtype)[:, None])
    return x + 0


ODD_ONES: dict[str, tuple[type[Denoiser], Callable[[Any], Tensor], str]] = {
    "samples that see each other": (Coupled, coupled, "branches side by side in 7 steps, 2 calls on all ranks"),
    "calls with effects": (
        Filling,
        filling,
        "branches side by side in 3 steps, one branch at a time in 1 steps, 11 calls on all ranks",
    ),
    "results that cannot be looked into": (Opaque, opaque, "12 calls on all ranks"),
    "an argument that is as long as the batch": (Sized, sized, "batch cut in 5 calls, 1 calls on all ranks"),
    "strides": (
        Transposed,
        transposed,
        "batch cut in 5 calls, branches side by side in 5 steps, one branch at a time in 1 steps, 2 calls on all ranks",
    ),
    "numbers": (
        Counting,
        counting,
        "branches side by side in 10 steps, one branch at a time in 2 steps, 2 calls on all ranks",
    ),
    "noise of its own": (Noisy, noisy, "18 calls on all ranks"),
    "rows for each frame": (Framed, framed, "batch cut in 5 calls, 1 calls on all ranks"),
    "a batch that the model takes apart": (TakenApart, taken_apart, "batch cut in 5 calls, 1 calls on all ranks"),
    "a part that is replaced": (
        Mixing,
        mixing,
        "batch cut in 4 calls, one branch at a time in 2 steps, 6 calls on all ranks",
    ),
    "three samples": (
        Denoiser,
        three_samples,
        "branches side by side in 5 steps, one branch at a time in 1 steps, 1 calls on all ranks",
    ),
    "written into": (Denoiser, written_into, "one branch at a time in 11 steps, 1 calls on all ranks"),
}
"""With what both requests say of their calls."""


def odd_one(name: str) -> tuple[list[float], str]:
    """(errors of two requests, report)."""
    kind, run, _ = ODD_ONES[name]
    model = kind()
    with torch.no_grad():
        want = run(model)
        with parafuse.apply(model, CFG) as handle:
            return [error(run(model), want), error(run(model), want)], handle.guidance[kind.__name__].report()


@pytest.mark.parametrize("name", ODD_ONES)
def test_what_cannot_be_shared_is_computed_by_all_and_the_rest_is_shared(name: str) -> None:
    for wrong, report in run_ranks(odd_one, 2, name):
        assert max(wrong) <= EXACT
        assert report == ODD_ONES[name][2]
