"""Whether a call of a pipeline has branches of guidance to share, as far as its arguments tell."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from parafuse.errors import ConfigError


def check_guided(pipeline: Any, keywords: dict[str, Any], degree: int) -> None:
    """Raises ConfigError for a call without guidance: the ranks of the `cfg` axis would have nothing to share."""
    why = _why_unguided(pipeline, keywords)
    if why:
        raise ConfigError(
            f"parallel.cfg={degree}: this call of {type(pipeline).__name__} has no guidance branches ({why}). Switch "
            "guidance on, or use cfg=1 and put the ranks on parallel.data or parallel.ulysses."
        )
    if degree > 2 and not _has_third(pipeline, keywords):
        raise ConfigError(
            f"parallel.cfg={degree}: this call of {type(pipeline).__name__} has 2 guidance branches. Use cfg=2, and "
            "put more ranks on parallel.data or parallel.ulysses."
        )


THIRD_BRANCH = (
    "skip_guidance_layers", "image_guidance_scale", "img_guidance_scale", "pag_scale", "stg_scale", "modality_scale",
)  # fmt: skip
"""Arguments of pipelines that ask for one branch more: layers skipped or perturbed, a picture without its prompt."""


def _has_third(pipeline: Any, keywords: dict[str, Any]) -> bool:
    """Whether a call asks for a third branch, or may: guiders and modular pipelines know by themselves."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if hasattr(pipeline, "guider") or not {"guidance_scale", "true_cfg_scale"} & set(parameters):
        return True
    given = {name: parameter.default for name, parameter in parameters.items()} | keywords
    return any(given.get(name) for name in THIRD_BRANCH)


def _why_unguided(pipeline: Any, keywords: dict[str, Any]) -> str:
    """Empty where there is guidance, or where only the run can tell (guiders, modular pipelines)."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given = {name: parameter.default for name, parameter in parameters.items()} | keywords
    has_scale = "guidance_scale" in parameters or "true_cfg_scale" in parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if hasattr(pipeline, "guider") or (open_ended and not has_scale):
        return ""
    if "true_cfg_scale" in parameters:
        scale = given["true_cfg_scale"]
        if scale is None or scale <= 1:
            return f"true_cfg_scale={scale}: must be above 1"
        if given.get("negative_prompt") is None and given.get("negative_prompt_embeds") is None:
            return "no negative_prompt"
        return ""
    if isinstance(getattr(type(pipeline), "do_classifier_free_guidance", None), property):
        return _by_its_property(pipeline, given)
    if "guidance_scale" not in parameters:
        return "it takes no guidance_scale"
    scale = given["guidance_scale"]
    if getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "guidance_embeds", False):
        return "the model was distilled: guidance_scale is an input of it"
    return "" if scale is None or scale > 1 else f"guidance_scale={scale}: must be above 1"


def _by_its_property(pipeline: Any, given: dict[str, Any]) -> str:
    """What the pipeline itself says of such a call."""
    asked = copy.copy(pipeline)
    vars(asked).update({f"_{name}": value for name, value in given.items()})
    try:
        guided = asked.do_classifier_free_guidance
    except Exception:  # it looks at what the run alone sets
        return ""
    scale = given.get("guidance_scale", given.get("max_guidance_scale"))
    # A tensor of scales, one for each frame, says nothing before the run.
    return "" if not isinstance(guided, bool) or guided else f"guidance_scale={scale}"
