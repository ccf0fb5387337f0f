"""The keywords of a pipeline's call: made from options, and checked against diffusers' source.

All of it before torch, diffusers or weights are loaded."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse.engine.request import NUM_PICTURES
from parafuse.errors import ConfigError, nearest

if TYPE_CHECKING:
    from parafuse.engine.source import ModelSource
    from parafuse.launch.asked import Asked

KEYWORDS = {
    "steps": "num_inference_steps",
    "width": "width",
    "height": "height",
    "negative_prompt": "negative_prompt",
}
"""Options that are keywords of the pipelines under another name. `guidance` and `num_images` depend on the model."""
ANY_PROMPT = "a red apple"
RESERVED = {
    "prompt": "give the prompts as arguments",
    "seed": "use --seed",
    "generator": "use --seed",
    "output_type": "the command line writes pictures; use parafuse.Engine from Python for other outputs",
    "return_dict": "the command line needs the pipeline's output object",
}
"""Keywords of the pipelines that --set does not take, and what to do."""


def call_keywords(asked: Asked, source: ModelSource) -> tuple[dict[str, Any], dict[str, str]]:
    """The pipeline's keywords from the options and --set, and what the user typed for each of them."""
    pipeline = getattr(source, "pipeline_class", None)
    accepted = (accepted_keywords(pipeline) if pipeline and getattr(asked, "num_images", None) else None) or []
    names = KEYWORDS | {
        "guidance": "true_cfg_scale" if "true_cfg_scale" in source.defaults else "guidance_scale",
        "num_images": next((name for name in NUM_PICTURES if name in accepted), NUM_PICTURES[0]),
    }
    call = {names[name]: value for name in names if (value := getattr(asked, name, None)) is not None}
    flags = {keyword: "--" + name.replace("_", "-") for name, keyword in names.items()}
    typed = {keyword: flags[keyword] for keyword in call}
    for text in asked.set:
        key, sign, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key.isidentifier():
            raise ConfigError(f"--set {text!r}: must be KEY=VALUE, such as --set max_sequence_length=128.")
        if key in RESERVED:
            raise ConfigError(f"--set {text!r}: {key} cannot be set here; {RESERVED[key]}.")
        if key in call:
            beside = f"{flags[key]} sets it too" if key in flags else "it is set twice"
            raise ConfigError(f"--set {text!r}: {beside}; leave one out.")
        call[key], typed[key] = json_value(value), f"--set {key}"
    return call, typed


def one_step_call(asked: Asked, source: ModelSource, prompt: str | None) -> dict[str, Any]:
    """Checked keywords for a call whose pictures do not count: one step where none are asked for, latents.

    `prompt` None: a prompt for a model that takes one. Raises ConfigError as `check_call` does."""
    from parafuse.engine.request import check_call

    call, typed = call_keywords(asked, source)
    accepted = accepted_keywords(source.pipeline_class) if source.pipeline_class else None
    if prompt is not None or accepted is None or "prompt" in accepted:
        call["prompt"] = ANY_PROMPT if prompt is None else prompt
    refuse_unknown(source, call)
    if accepted is None or "num_inference_steps" in accepted:
        call.setdefault("num_inference_steps", 1)
    if accepted is not None and "output_type" in accepted:
        call["output_type"] = "latent"
    try:
        return check_call(source, call)
    except ConfigError as error:
        raise as_typed(error, typed) from error


def call_for_prompts(asked: Asked, source: ModelSource, prompts: Sequence[str]) -> dict[str, Any]:
    """Keywords for calls with each of these prompts, checked. Raises ConfigError as `check_call` does."""
    from parafuse.engine.request import check_call

    call, typed = call_keywords(asked, source)
    refuse_unknown(source, call)
    try:
        for prompt in prompts:
            check_call(source, call | {"prompt": prompt})
    except ConfigError as error:
        raise as_typed(error, typed) from error
    return call


def as_typed(error: ConfigError, typed: dict[str, str]) -> ConfigError:
    """The error under the name that the user typed: `num_inference_steps=0: ...` becomes `--steps 0: ...`."""
    keyword, sign, rest = str(error).partition("=")
    if not sign or keyword not in typed:
        return error
    return ConfigError(f"{typed[keyword]}{'=' if ' ' in typed[keyword] else ' '}{rest}")


def refuse_unknown(source: ModelSource, call: dict[str, Any]) -> None:
    """Raises ConfigError for a keyword that the model's pipeline does not take, where its source tells."""
    name = getattr(source, "pipeline_class", None)
    accepted = accepted_keywords(name) if name else None
    if accepted is None:
        return
    for key in call:
        if key not in accepted:
            others = ", ".join(k for k in accepted if k not in RESERVED)
            hint = nearest(key, accepted) or f"; it takes {others}."
            raise ConfigError(f"model={source.name!r}: the call of {name} has no {key!r}{hint}")


def json_value(text: str) -> Any:
    """The JSON value; what is no JSON is taken as text, so that words need no second pair of quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def accepted_keywords(pipeline_class: str) -> list[str] | None:
    """Keywords of `pipeline_class.__call__`; None where the source does not tell (a class that is not diffusers' own,
    an inherited call, or one that takes any keyword)."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        return None
    opening = f"class {pipeline_class}("
    for file in sorted((Path(spec.origin).parent / "pipelines").glob("**/*.py")):
        text = file.read_text(encoding="utf-8")
        if opening in text:
            return _call_of(pipeline_class, ast.parse(text))
    return None


def _call_of(name: str, module: ast.Module) -> list[str] | None:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__call__" and item.args.kwarg is None:
                    return [arg.arg for arg in [*item.args.args[1:], *item.args.kwonlyargs]]
    return None
