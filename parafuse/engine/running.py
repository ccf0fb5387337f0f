"""One request on this rank: what is open while it denoises, what while it decodes, and what is told of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from parafuse.engine.apply import Handle
from parafuse.engine.caches.report import check_followed, following, report, skips
from parafuse.engine.calls import paint, steps_of
from parafuse.engine.compiling import Compiling
from parafuse.engine.host_times import host_times
from parafuse.engine.plan import Plan
from parafuse.engine.told import exchanged_since, say_idle, seen_by, told_by
from parafuse.parallel.comm import Count
from parafuse.parallel.world import World

SAME_PIPELINE = "Change it on the engine (engine.load_lora_weights(...), engine.vae.enable_tiling()), on every rank."
DECODED = "decoded"
"""What ranks call the end of a request that has denoised before."""


class Running:
    """A request from its first call of the pipeline on."""

    def __init__(
        self,
        pipeline: Any,
        plan: Plan,
        handle: Handle,
        world: World,
        *,
        compiling: Compiling | None,
        shown: bool,
        autoencoders: Callable[[], dict[str, str]],
    ):
        """`shown`: whether there is a progress bar. `autoencoders`: what ranks' autoencoders are, in a word each."""
        self.pipeline, self.handle, self.world, self._plan, self._compiling = pipeline, handle, world, plan, compiling
        self._shown, self._autoencoders = shown, autoencoders
        self._begun = time.perf_counter()
        self.sent_before = handle.exchanged()
        self._seen = seen_by(handle)
        self._denoising, self._decoding = ExitStack(), ExitStack()
        self._told: dict[str, Any] = {}
        self._denoised_s: float | None = None
        self._agreed = False
        self.given_generators: list[torch.Generator] = []
        """Those that were no seed's: other calls may have them too."""
        handle.rounds.forget()
        for sequence in handle.sequence.values():
            if sequence.has_changed():
                sequence.renew()
        changed = world.any_says("modules", [one.has_changed() for one in self._seen]) if self._seen else []
        for one, has_changed in zip(self._seen, changed, strict=True):
            one.forget_if(has_changed)
        world.share_noise()

    def paint(self, call: dict[str, Any], around: AbstractContextManager[Any]) -> Any:
        """The pipeline's output. `around`: what stands around the call, on its outside."""
        with self._decoding, self._denoising as stack:
            stack.enter_context(following(self._plan.replay, self.handle.skipping))
            self._memories = memories = stack.enter_context(self.handle.request())
            self._progress = stack.enter_context(
                steps_of(self.pipeline, call, shown=self._shown, skips=lambda: skips(memories))
            )
            stack.enter_context(host_times(self.pipeline))
            stack.enter_context(self.world.request())
            with around:
                output = paint(self.pipeline, call)
            self._end_denoising()
        return output

    @property
    def is_in_callback(self) -> bool:
        """Whether the user's own callback of a step runs now."""
        return self._progress.is_in_callback

    def hand_over(self) -> None:
        """Denoising has ended: another request may begin, while this one decodes. Collective. Raises RankError where
        ranks' autoencoders differ."""
        self.agree_on_autoencoders()
        self._end_denoising()
        self._denoised_s = time.perf_counter() - self._begun
        self._decoding.enter_context(self.world.request(DECODED))

    def agree_on_autoencoders(self) -> None:
        """Raises RankMismatchError where they differ; a second call does nothing. Collective."""
        if not self._agreed:
            self._agreed = True
            self.world.agree("an autoencoder", self._autoencoders(), way_out=SAME_PIPELINE)

    def _end_denoising(self) -> None:
        """Closes what is open for it, and notes what it did; a second call does nothing. Collective."""
        if self._told:
            return
        check_followed(self._plan.replay, self._memories)
        self._denoising.close()
        say_idle(self.handle, self._seen)
        self._told = {
            **told_by(self.handle, self._seen),
            "exchanged": exchanged_since(self.handle, self.sent_before),
            "cache": self._cache_report(),
            "compiled": self._compiling.report() if self._compiling else None,
        }

    def _cache_report(self) -> dict[str, Any]:
        if self.handle.skips_cache and self.handle.cache is not None:
            return {"off": str(self.handle.cache)}
        return report(self.handle.cache, self._memories, self.world)

    def told(self, decodes_before: Mapping[str, Count]) -> dict[str, Any]:
        """For the receipt of a request that has ended. `decodes_before`: what had gone between ranks when this one
        began to decode, where another one decoded meanwhile."""
        spread = self.handle.autoencoders()
        before = {
            name: max(count, decodes_before.get(name, count), key=_calls) for name, count in self.sent_before.items()
        }
        decoding = exchanged_since(self.handle, before, decoding=True)
        steps_s = [round(s, 4) for s in self._progress.steps_s]
        denoised = {} if self._denoised_s is None else {"denoised": round(self._denoised_s, 3)}
        return {
            **self._told,
            "vae": [line for one in spread.values() for line in one.lines()],
            "exchanged": self._told["exchanged"] | decoding,
            "timings_s": {"request": round(time.perf_counter() - self._begun, 3), **denoised, "steps": steps_s},
        }


def _calls(count: Count) -> int:
    return count.calls
