"""Whether weights come beside what computes, on a GPU: `python tools/time_offload.py`.

A model of 12 blocks of 64 MB, each of which multiplies so often that it computes for a part or a multiple of the time
that its weights take to come, with all weights in place and with `offload="group"`, in turns. Copies that are covered
(1.2 and more) should cost at most a tenth; below that a call takes as long as the copies do.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import parafuse

WIDTH, BLOCKS, ROUNDS = 4096, 12, 9
RATIOS = (0.25, 0.5, 1.0, 1.2, 1.5, 2.0, 4.0)
"""Of computing to copying, of one block."""


class Repeated(nn.Module):
    """A product, several times over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5, requires_grad=False)
        self.times = 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x @ self.weight
        return x


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Repeated() for _ in range(BLOCKS)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def seconds(run: Any) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU")
    x = torch.randn(4096, WIDTH, device="cuda")
    pinned = torch.empty(4 * WIDTH**2, dtype=torch.uint8, pin_memory=True)
    here = torch.empty_like(pinned, device="cuda")
    copy_s = min(seconds(lambda: here.copy_(pinned, non_blocking=True)) for _ in range(5))
    one = Repeated().cuda()
    product_s = min(seconds(lambda: one(x)) for _ in range(5))
    print(f"a block comes in {1e3 * copy_s:.2f} ms ({len(pinned) / copy_s / 1e9:.1f} GB/s)")
    with torch.no_grad(), ExitStack() as stack:
        models = {"in place": Wide().cuda(), "group": Wide()}
        handle = stack.enter_context(parafuse.apply(models["group"], parafuse.Config(offload="group")))
        for ratio in RATIOS:
            times = max(1, round(ratio * copy_s / product_s))
            found: dict[str, list[float]] = {way: [] for way in models}
            with handle.request():
                for turn in range(1 + ROUNDS):
                    for way, model in models.items():
                        for block in model.blocks:
                            block.times = times  # pyright: ignore[reportAttributeAccessIssue]
                        took = seconds(lambda model=model: model(x))
                        found[way] += [took] if turn else []
            plain, offloaded = (statistics.median(one) for one in found.values())
            print(f"computing {times * product_s / copy_s:.2f} of copying: x {offloaded / plain:.3f}")


if __name__ == "__main__":
    main()
