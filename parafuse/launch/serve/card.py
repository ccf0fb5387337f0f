"""What a server has to know of its model to check a request, found without torch or weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parafuse.engine.request import check_call
from parafuse.engine.source import EMBEDDED, ModelSource, locate
from parafuse.errors import ModelError
from parafuse.launch.keywords import accepted_keywords
from parafuse.launch.serve.latents import Autoencoder

GUIDANCE = ("guidance_scale", "true_cfg_scale")
IMAGE, MASK = "image", "mask_image"
VIDEO_CLASSES = ("Video", "Wan", "LTX", "Mochi", "CogVideo", "Allegro", "Latte")
IMAGE_CLASSES = ("Img2Img", "Inpaint", "Edit", "Kontext", "Image2Video", "ImageToVideo", "Fill")
ALWAYS = frozenset({"prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale"})
"""What is taken for granted of a pipeline whose source does not tell its keywords."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model as clients see it."""

    name: str
    """What clients are told. Never a path of this machine: a folder's last part."""
    pipeline_class: str | None
    kind: str
    """image or video."""
    accepted: frozenset[str] | None
    """Keywords of the pipeline's call; None where its source does not tell."""
    defaults: Mapping[str, Any]
    """Keywords that the model itself sets where a request does not; of those, what JSON can say (no pictures)."""
    size_multiple: int | None
    guidance: str | None
    """The keyword that a request's `guidance` becomes; None: the pipeline has none."""
    loras: Path | None = None
    """Folder of the LoRA files that requests may name."""
    names: tuple[str, ...] = ()
    """All that requests may call it."""
    autoencoder: Autoencoder | None = None
    """What its VAE takes; None: not known before it is loaded, or there is none."""
    source: ModelSource = field(repr=False)

    def takes(self, keyword: str) -> bool:
        """Whether the pipeline's call has this keyword."""
        if self.accepted is not None:
            return keyword in self.accepted
        is_for_images = any(part in (self.pipeline_class or "") for part in IMAGE_CLASSES)
        return keyword in ALWAYS or (keyword == IMAGE and is_for_images) or (keyword == MASK and self._paints_in)

    @property
    def _paints_in(self) -> bool:
        return any(part in (self.pipeline_class or "") for part in ("Inpaint", "Fill"))

    @property
    def settings(self) -> dict[str, Any]:
        """What a call has, beside its texts, where a request says nothing."""
        texts = ("prompt", "negative_prompt")
        return {name: value for name, value in self.defaults.items() if name not in texts and value is not None}

    @property
    def may_have_vae(self) -> bool:
        """False where it is known that there is none."""
        return self.source.components is None or "vae" in self.source.components

    def is_called(self, name: str) -> bool:
        """Whether a request for this model may name it so."""
        return name == self.name or name in self.names

    def check(self, keywords: Mapping[str, Any]) -> None:
        """Raises ConfigError for the first of a call's keywords that is wrong, named as the pipeline names it."""
        check_call(self.source, dict(keywords))

    def lora_names(self) -> list[str]:
        """LoRAs that requests may name: looked up each time, so that one can be added while the server runs. Blocks
        for as long as listing a folder takes."""
        return [] if self.loras is None else sorted(file.stem for file in self.loras.glob("*.safetensors"))


def card_of(
    model: str, *, allow_pickle: bool = False, loras: str | None = None, names: tuple[str, ...] = ()
) -> ModelCard:
    """The card of a model. `names`: what clients call it instead of its own name, the one that they are told first.
    Raises ModelError where it cannot be found or read."""
    source = locate(model, allow_pickle=allow_pickle)
    pipeline = source.pipeline_class or (_hub_class(source) if source.kind == "hub" else None)
    keywords = accepted_keywords(pipeline) if pipeline else None
    accepted = None if keywords is None else frozenset(keywords)
    is_path = source.kind in ("folder", "file") and Path(source.path).parent != EMBEDDED
    own = Path(source.path).stem if is_path else source.name
    vae = _hub_vae(source) if source.kind == "hub" else source.vae
    return ModelCard(
        name=names[0] if names else own,
        names=names or (own,),
        pipeline_class=pipeline,
        kind=_kind(pipeline, accepted),
        accepted=accepted,
        defaults={name: value for name, value in source.defaults.items() if _is_plain(value)},
        size_multiple=source.size_multiple,
        guidance=_guidance(source, accepted),
        loras=None if loras is None else Path(loras),
        autoencoder=None if vae is None else Autoencoder.of(vae),
        source=source,
    )


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _kind(pipeline: str | None, accepted: frozenset[str] | None) -> str:
    if accepted is not None:
        return "video" if "num_frames" in accepted else "image"
    return "video" if any(part in (pipeline or "") for part in VIDEO_CLASSES) else "image"


def _guidance(source: ModelSource, accepted: frozenset[str] | None) -> str | None:
    """As on the command line: the one that the model sets, else guidance_scale, where the pipeline has it."""
    if GUIDANCE[1] in source.defaults or accepted is None:
        return GUIDANCE[1] if GUIDANCE[1] in source.defaults else GUIDANCE[0]
    return next((name for name in GUIDANCE if name in accepted), None)


def _hub_class(source: ModelSource) -> str:
    """The pipeline's class from a hub repository's index: a small file, from the cache if it is there."""
    from huggingface_hub import hf_hub_download

    try:
        named = json.loads(Path(hf_hub_download(source.path, "model_index.json")).read_text())["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model={source.name!r}: model_index.json cannot be read from the hub ({type(error).__name__}). Download "
            "the model first, or give the folder that holds it."
        ) from error
    return str(named[-1] if isinstance(named, list) else named)


def _hub_vae(source: ModelSource) -> dict[str, Any] | None:
    """Its VAE's configuration: a small file too. None where there is none; then the ranks know."""
    from huggingface_hub import hf_hub_download

    try:
        found = json.loads(Path(hf_hub_download(source.path, "vae/config.json")).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
