"""What a supervisor of ranks knows of a call: where it is, what is left of it, and what its consumer is yet to hear."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from parafuse.launch.serve.group import GroupLostError
from parafuse.launch.serve.messages import Failed, Paint, Painted, Stepped

STEPS = "num_inference_steps"
STOP_STEPS = 3
"""Within which a call that is stopped ends."""
MOST_STOP_S = 300.0
"""For a call that was told to end, whatever it does; then its ranks are started again."""


@dataclass
class Call:
    """One attempt. Times are of the supervisor's clock."""

    paint: Paint
    predicted_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """By phase; of denoising one step's."""
    waits: bool = True
    """For ranks to be ready; False: it fails where they are not."""
    is_probe: bool = False
    events: asyncio.Queue[Stepped | Painted | Failed | GroupLostError] = field(default_factory=asyncio.Queue)
    begun_at: float = 0.0
    step: int = 0
    num_steps: int = 0
    steps_s: float = 0.0
    slowest_s: float = 0.0
    stop_reason: str = ""
    stop_since: float = 0.0
    """When it was stopped, or since when it has been denoising after that."""
    stop_told: float = 0.0
    """When it was stopped."""
    idle_since: float | None = None
    """Since when the ranks say that they do nothing."""

    @property
    def kind(self) -> str:
        """Equal for calls whose steps take as long."""
        settings = {name: value for name, value in self.paint.settings.items() if name != STEPS}
        outputs = [item.num_outputs for item in self.paint.items]
        coding = msgspec.to_builtins(self.paint.coding)
        own = [self.paint.cache, len(self.paint.lora), coding]
        return json.dumps([settings, outputs, *own], sort_keys=True, default=str)

    def stepped(self, event: Stepped) -> None:
        self.step, self.num_steps = event.step, event.num_steps
        self.steps_s += event.seconds
        self.slowest_s = max(self.slowest_s, event.seconds)

    def left_s(self, now: float) -> float:
        """What it is expected to take from now on: by its own steps, else as predicted; 0 where nothing is known."""
        predicted = sum(s for phase, s in self.predicted_s.items() if phase != "denoising")
        step_s = self.steps_s / self.step if self.step else self.predicted_s.get("denoising", 0.0)
        number = self.num_steps or int(self.paint.settings.get(STEPS) or 0)
        if not self.step:
            return max(0.0, predicted + number * step_s - (now - self.begun_at))
        return (number - self.step) * step_s + sum(self.predicted_s.get(name, 0.0) for name in ("decoding", "writing"))

    def ignores_stop(self, now: float, phase: str, limit_s: float) -> bool:
        """Whether it goes on denoising, or does nothing, though it was told to end. `limit_s`: of one step. While it
        is in another phase its clock stands: there is no step boundary, and that phase has a limit of its own. But
        not for ever: a step may be as long as somebody's request makes it, and others wait."""
        if not self.stop_reason:
            return False
        if now - self.stop_told > MOST_STOP_S:
            return True
        if phase not in ("denoising", "idle"):
            self.stop_since = now
        return now - self.stop_since > STOP_STEPS * self.slowest_s + limit_s
