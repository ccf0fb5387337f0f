"""Words and pictures as conditions: textual inversion, IP-Adapter, encoders by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.adapters import IMAGE_WIDTH, inversion, ip_adapter_for_flux, ip_adapter_for_unet
from tests.drop_in.script import Script, Scripts, bare, distance, effect, picture

WORD = {"prompt": ["a <thing>", "the apple"]}


def load_word(x: Any) -> None:
    x.load_textual_inversion(inversion(bare(x).text_encoder, 2, seed=1), token="<thing>")


def load_textual_inversion(x: Any, _: Path) -> Any:
    return effect(x, lambda: load_word(x), undo=lambda: x.unload_textual_inversion("<thing>"), call=WORD)


def unload_textual_inversion(x: Any, _: Path) -> Any:
    load_word(x)
    return effect(x, x.unload_textual_inversion, call=WORD)


def maybe_convert_prompt(x: Any, _: Path) -> Any:
    load_word(x)
    return x.maybe_convert_prompt(["a <thing>"], bare(x).tokenizer)


def is_unet(x: Any) -> bool:
    return hasattr(bare(x), "unet")


def load_pictures(x: Any) -> None:
    if is_unet(x):
        adapter = ip_adapter_for_unet(bare(x).unet, seed=5)
        x.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None)
    else:
        adapter = ip_adapter_for_flux(bare(x).transformer, seed=5)
        x.load_ip_adapter(adapter, weight_name=None, image_encoder_pretrained_model_name_or_path=None)


def embeds(x: Any) -> dict[str, Any]:
    """Of a picture for each prompt; with guidance, one of no picture before each."""
    branches = 2 if is_unet(x) else 1
    values = torch.randn(2 * branches, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(2))
    if is_unet(x):
        return {"ip_adapter_image_embeds": [values]}
    return {"ip_adapter_image_embeds": [values], "negative_ip_adapter_image_embeds": [torch.zeros_like(values)]}


def load_ip_adapter(x: Any, _: Path) -> Any:
    before = picture(x)
    load_pictures(x)
    after = picture(x, **embeds(x))
    assert distance(before, after) > 1e-4
    x.unload_ip_adapter()
    again = picture(x)
    assert distance(before, again) < 1e-5
    return [before, after, again]


def set_ip_adapter_scale(x: Any, _: Path) -> Any:
    load_pictures(x)
    return effect(x, lambda: x.set_ip_adapter_scale(0.3), call=embeds(x))


def prepare_ip_adapter_image_embeds(x: Any, _: Path) -> Any:
    load_pictures(x)
    given = embeds(x)["ip_adapter_image_embeds"]
    more = (True,) if is_unet(x) else ()
    return x.prepare_ip_adapter_image_embeds(None, given, torch.device("cpu"), 1, *more)


def encode_image(x: Any, _: Path) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=IMAGE_WIDTH,
    )  # fmt: skip
    x.image_encoder = CLIPVisionModelWithProjection(config).eval()
    return x.encode_image(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), "cpu", 2)


def scripts() -> Scripts:
    changes = (
        load_textual_inversion, unload_textual_inversion, maybe_convert_prompt, load_ip_adapter, set_ip_adapter_scale,
        prepare_ip_adapter_image_embeds, encode_image,
    )  # fmt: skip
    found = {run.__name__: Script(run=run) for run in changes}
    return found | {"unload_ip_adapter": found["load_ip_adapter"]}
