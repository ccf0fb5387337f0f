"""Facts of a model: one request of the pipeline's own on weights without memory, and calls of its denoisers as one rank
of 2 and of 4 would make them. Nothing is loaded, downloaded, computed or exchanged."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from parafuse.engine.calls import call_keywords, paint
from parafuse.engine.host_times import host_times
from parafuse.engine.memory.fake_pipeline import components, convertible, fake_mode, fake_pipeline, nbytes
from parafuse.engine.memory.phases import counting, met
from parafuse.engine.memory.repeats import repeats
from parafuse.engine.modular import takes_generator
from parafuse.engine.plan import Plan
from parafuse.engine.planning.facts import DECODE, DENOISE, Facts
from parafuse.engine.planning.follow import Calls, Follower, activations, rows_of, without_memory
from parafuse.engine.request import NUM_PICTURES
from parafuse.engine.source import ModelSource
from parafuse.engine.targets import DENOISERS
from parafuse.errors import ParafuseError, UnsupportedError

STEPS = 2
"""Enough to tell how often each component is called in a step."""


class _Decoded(Exception):
    """What follows is the pipeline's own work on pictures."""


def gather(
    source: ModelSource,
    plan: Plan,
    call: Mapping[str, Any] | None = None,
    *,
    pipeline: Any = None,
    given: Mapping[str, nn.Module] | None = None,
    tiled: bool = False,
) -> Facts:
    """Facts of a request to a model: its keywords as for the pipeline, a prompt is not needed. Local.

    `plan`: of one rank; its dtype and device count. `pipeline`: one that is loaded, in place of what the source names;
    its weights are left alone. `given`: parts in the place of the model's own. `tiled`: pictures are decoded in tiles,
    even if the pipeline would not. Raises ConfigError for a call that the pipeline does not take,
    ModelError where configurations are not at hand, UnsupportedError for a pipeline that cannot be followed without
    values."""
    mode = fake_mode()
    dtype = getattr(torch, plan.dtype)
    if pipeline is None:
        followed = fake_pipeline(source, dtype, mode)
        followed.register_modules(**{name: without_memory(part, mode) for name, part in (given or {}).items()})
    else:
        followed = _without_memory(pipeline, mode)
    if tiled and hasattr(getattr(followed, "vae", None), "use_tiling"):
        followed.vae.use_tiling = True
    followed.set_progress_bar_config(disable=True)
    asked = call_keywords(followed, source, plan, (), {"prompt": "a red apple", **(call or {})})
    return _Gathering(followed, source, plan).facts(asked)


class _Gathering(Follower):
    """Those of a pipeline, in one request."""

    def __init__(self, pipeline: Any, source: ModelSource, plan: Plan):
        super().__init__(components(pipeline), plan.device)
        self.pipeline, self.source, self.plan = pipeline, source, plan
        self.calls: dict[tuple[str, str], Calls] = {}
        self.tiles = 0

    def facts(self, asked: dict[str, Any]) -> Facts:
        number = _steps_of(self.pipeline, asked)
        self._request(asked)
        # a scheduler may call more often than it has steps: twice in each but the last, or once more in all
        here = _timesteps(self.pipeline, STEPS) or STEPS
        more = (_timesteps(self.pipeline, number) or here * number / STEPS) / here
        found = [
            self.part(name, phase, one, one.number * more if phase == DENOISE else one.number)
            for (name, phase), one in self.calls.items()
        ]
        per_step = sum(one.number for (_, phase), one in self.calls.items() if phase == DENOISE) / here
        rows = max((one.rows for (_, phase), one in self.calls.items() if phase == DENOISE), default=1)
        pictures = _pictures(asked)
        stacked = max(1, rows // pictures)
        result = max((one.result_bytes / one.rows for one in self.calls.values()), default=0.0)
        return Facts(
            model=self.source.name,
            model_id=self.source.model_id,
            dtype=self.plan.dtype,
            call={name: value for name, value in asked.items() if isinstance(value, (str, int, float, bool))},
            steps=number,
            pictures=pictures,
            branches=stacked * max(1, round(per_step)),
            stacked=stacked > 1,
            weights={name: nbytes(part) for name, part in self.parts.items()},
            parts=tuple(found),
            result_bytes=result,
            tiles=self.tiles,
        )

    def _request(self, asked: dict[str, Any]) -> None:
        """One request, until its first decode has ended."""
        keywords = dict(asked)
        if "num_inference_steps" in inspect.signature(type(self.pipeline).__call__).parameters:
            keywords["num_inference_steps"] = STEPS
        if takes_generator(self.pipeline):
            keywords["generator"] = torch.Generator("cpu").manual_seed(0)
        with ExitStack() as inside:
            for name, part in self.parts.items():
                if name in DENOISERS:
                    inside.enter_context(self._noted(name, part))
            inside.enter_context(convertible(self.pipeline))
            inside.enter_context(host_times(self.pipeline))
            inside.enter_context(self.inside())
            coded = inside.enter_context(repeats(self.pipeline, self.recorder))
            inside.enter_context(met(self.pipeline, self._counting))
            try:
                paint(self.pipeline, keywords)
            except _Decoded:
                self.tiles = coded["decoder"] if is_tiled(self.pipeline) else 0
            except ParafuseError:
                raise
            except Exception as error:
                first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
                raise UnsupportedError(
                    f"{type(self.pipeline).__name__} cannot be followed without values "
                    f"({type(error).__name__}: {first}); name its layout: --ulysses, --cfg, --data."
                ) from error

    @contextmanager
    def _noted(self, name: str, part: nn.Module) -> Iterator[None]:
        """Keeps the arguments of the first call, and the number of samples."""

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            one = self.calls.setdefault((name, DENOISE), Calls())
            if one.arguments is None:
                one.arguments = args, dict(kwargs)
                one.rows = rows_of(args, kwargs)

        hook = part.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _counting(self, name: str, phase: str) -> Callable[[list[Any]], Any]:
        one = self.calls.setdefault((name, phase), Calls())
        one.number += 1
        self.recorder.peaks.clear()
        leave = counting(self.recorder)(name, phase)
        inside = ExitStack()
        seen = inside.enter_context(self.recorder.recorded())

        def left(results: list[Any]) -> Any:
            inside.close()
            one.first = one.first or seen
            one.total += seen
            one.peak = max(one.peak, activations(self.recorder, phase))
            if phase == DECODE:
                raise _Decoded
            if phase == DENOISE:
                one.result_bytes = float(sum(x.nbytes for x in tree_leaves(results) if isinstance(x, Tensor)))
            return leave(results)

        return left


def _steps_of(pipeline: Any, asked: Mapping[str, Any]) -> int:
    """Denoising steps of a request."""
    given = asked.get("num_inference_steps")
    if isinstance(given, int):
        return given
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    default = parameter.default if parameter is not None else 1
    return default if isinstance(default, int) else 1


def _timesteps(pipeline: Any, steps: int) -> int | None:
    """Of so many steps, how many the pipeline's scheduler makes; None where it does not say."""
    try:
        scheduler = copy.deepcopy(pipeline.scheduler)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)
    except Exception:  # it wants sigmas, or a shift, or there is none
        return None


def _pictures(asked: Mapping[str, Any]) -> int:
    prompts = asked.get("prompt")
    each = next((asked[name] for name in NUM_PICTURES if asked.get(name)), 1)
    return (len(prompts) if isinstance(prompts, (list, tuple)) else 1) * each


def _without_memory(pipeline: Any, mode: FakeTensorMode) -> Any:
    """A pipeline like one that is loaded, its weights without memory. Raises UnsupportedError for one that cannot be
    made again from its parts."""
    parts: dict[str, Any] = {}
    try:
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                parts[name] = without_memory(part, mode)
            else:
                parts[name] = copy.deepcopy(part) if is_stateful(part) else part
        accepted = inspect.signature(type(pipeline).__init__).parameters
        settings = {name: value for name, value in pipeline.config.items() if name in accepted and name not in parts}
        return type(pipeline)(**parts, **settings)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"{type(pipeline).__name__} cannot be copied without its weights ({type(error).__name__}: {first}); name "
            "its layout: --ulysses, --cfg, --data."
        ) from error


def is_tiled(pipeline: Any) -> bool:
    """Whether its autoencoder divides large pictures into tiles."""
    return bool(getattr(getattr(pipeline, "vae", None), "use_tiling", False))


def is_stateful(part: Any) -> bool:
    """Whether a request changes it: a scheduler."""
    return hasattr(part, "set_timesteps")
