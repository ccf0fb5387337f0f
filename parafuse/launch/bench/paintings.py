"""What every variant paints for a few prompts, against the baseline's pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parafuse.launch.bench.fidelity import compare, pictures

if TYPE_CHECKING:
    from parafuse.launch.bench.run import Run

SHOWN_FRAMES = 3
"""Of a video: its first, a middle one and its last."""


@dataclass
class Painted:
    """One prompt by one variant."""

    prompt: str
    variant: str
    seed: int
    quality: dict[str, float]
    """Against the baseline's; empty for the baseline itself."""
    shown: list[Tensor] = field(default_factory=list[Tensor])
    """(3, H, W) in 0..1."""


@dataclass
class Paintings:
    """Filled on rank 0. The first prompt is the one that was timed, with its seed."""

    prompts: tuple[str, ...]
    seed: int
    painted: list[Painted] = field(default_factory=list[Painted])

    def paint(self, run: Run) -> None:
        """Every prompt by every variant that works. Collective on all ranks."""
        for number, prompt in enumerate(self.prompts):
            seed = self.seed + number
            wanted: Tensor | None = None
            for entry in run.entries:
                if entry.row.error:
                    continue
                more: dict[str, Any] = {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(seed)}
                output = entry.output if number == 0 else run.paint(entry, more)
                if run.rank != 0 or output is None:
                    continue
                found = pictures(output)
                quality = compare(found, wanted) if wanted is not None else {}
                wanted = found if wanted is None else wanted
                shown = [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})][:SHOWN_FRAMES]
                self.painted.append(Painted(prompt, entry.variant.name, seed, quality, shown))

    def to_list(self) -> list[dict[str, Any]]:
        """Ready for JSON, without the pictures."""
        return [{name: value for name, value in asdict(one).items() if name != "shown"} for one in self.painted]
