"""One call of the pipeline: its arguments by name, its steps counted, its errors told apart."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from parafuse.config import Axis
from parafuse.engine.guided import check_guided
from parafuse.engine.modular import settle_state, takes_generator
from parafuse.engine.plan import Plan
from parafuse.engine.progress import StepProgress
from parafuse.engine.request import can_encode, check_call, check_keywords
from parafuse.engine.source import ModelSource
from parafuse.errors import ConfigError, MemoryLimitError, is_out_of_memory
from parafuse.parallel.placeholder import settled


def paint(pipeline: Any, call: dict[str, Any]) -> Any:
    """The pipeline's own call, with all its values; what its `check_inputs` refuses is a ConfigError."""
    try:
        return settle_state(settled(pipeline(**call)))
    except ValueError as error:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if "check_inputs" in frames:
            raise ConfigError(f"call of {type(pipeline).__name__}: {error}") from error
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            reason = str(error).partition("\n")[0]
            raise MemoryLimitError(f"out of memory: ask for a smaller size, or more ranks ({reason})") from error
        raise


def call_keywords(
    pipeline: Any, source: ModelSource, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, checked, with the model's defaults. Raises ConfigError for the first that is wrong."""
    kind = type(pipeline).__name__
    signature = inspect.signature(type(pipeline).__call__)
    names = list(signature.parameters)[1:]
    if len(args) > len(names):
        raise ConfigError(f"call of {kind}: {len(args)} positional arguments are too many.")
    keywords = dict(zip(names, args, strict=False))
    double = keywords.keys() & kwargs.keys()
    if double:
        raise ConfigError(f"call of {kind}: {sorted(double)[0]!r} is given twice.")
    keywords |= kwargs
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        check_keywords(keywords, names, kind)
    checked = check_call(source, keywords, encodes=can_encode(pipeline))
    if plan.degree(Axis.CFG) > 1 and not plan.chosen:
        check_guided(pipeline, checked, plan.degree(Axis.CFG))
    return checked


def with_noise(pipeline: Any, keywords: dict[str, Any], seed: int | Sequence[int] | None) -> dict[str, Any]:
    """The keywords of a call with generators made from the seed, where the pipeline takes any."""
    call = dict(keywords)
    if not takes_generator(pipeline):
        pass
    elif isinstance(seed, int):
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    elif seed is not None:
        call["generator"] = [torch.Generator("cpu").manual_seed(one) for one in seed]
    return call


def generators_in(keywords: dict[str, Any]) -> list[torch.Generator]:
    """Those that a call was given."""
    return [x for x in tree_leaves(keywords.get("generator")) if isinstance(x, torch.Generator)]


def steps_of(pipeline: Any, call: dict[str, Any], *, shown: bool, skips: Callable[[], tuple[int, int]]) -> StepProgress:
    """Counts steps through the pipeline's callback where it has one, which goes into the call."""
    progress = StepProgress(
        shown=shown, total=call.get("num_inference_steps"), user=call.get("callback_on_step_end"), skips=skips
    )
    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        wanted = getattr(call.get("callback_on_step_end"), "tensor_inputs", None)
        if wanted is not None:  # diffusers' own callback classes say themselves what they need
            call["callback_on_step_end_tensor_inputs"] = wanted
        call["callback_on_step_end"] = progress.callback
    return progress
