"""Pictures from transformers that are in no family of several pipelines."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, legible, made, prompts, rows
from tests.pipelines import _t5, _t5_tokenizer, _vae
from tests.zoo import chroma, pixart, sana, z_image
from tests.zoo.lumina2 import CASES as LUMINA2

COMMON: dict[str, Any] = dict(num_inference_steps=STEPS, output_type="latent")
SANA_VAE: dict[str, Any] = dict(
    in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
)  # fmt: skip


def _flow(pipeline: str, transformer: Any, *, vae: Any = None, **more: Any) -> Any:
    return assemble(
        pipeline,
        transformer=transformer,
        vae=vae or _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **more,
    )


def _written(*, embeddings: bool = False) -> dict[str, Any]:
    """A text encoder and its tokenizer; `embeddings`: neither."""
    if embeddings:
        return dict(text_encoder=None, tokenizer=None)
    return dict(text_encoder=_t5("T5"), tokenizer=_t5_tokenizer())


def build_chroma() -> Any:
    transformer = made("ChromaTransformer2DModel", chroma.CONFIG, in_channels=16)
    return _flow("ChromaPipeline", transformer, **_written())


def build_z_image() -> Any:
    transformer = made("ZImageTransformer2DModel", z_image.Z_IMAGE)
    return _flow("ZImagePipeline", transformer, **_written(embeddings=True))


def build_lumina2() -> Any:
    transformer = made("Lumina2Transformer2DModel", LUMINA2[0].config)
    return _flow("Lumina2Pipeline", transformer, **_written(embeddings=True))


def build_pixart() -> Any:
    return assemble(
        "PixArtSigmaPipeline",
        transformer=made("PixArtTransformer2DModel", pixart.PIXART, caption_channels=32),
        vae=_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        **_written(),
    )


def build_sana() -> Any:
    transformer = made("SanaTransformer2DModel", sana.SANA)
    return _flow("SanaPipeline", transformer, vae=diffusers.AutoencoderDC(**SANA_VAE), **_written(embeddings=True))


def call_chroma(count: int) -> dict[str, Any]:
    return COMMON | prompts(count) | dict(height=8, width=12, guidance_scale=5.0, max_sequence_length=9)


def call_z_image(count: int) -> dict[str, Any]:
    """Texts without a batch dim, each a token shorter than the one before; the last step has no guidance."""
    return COMMON | dict(
        prompt_embeds=[x[: 37 - i] for i, x in enumerate(rows(count, 37, 20, seed=1))],
        negative_prompt_embeds=[x[: 12 - i] for i, x in enumerate(rows(count, 12, 20, seed=2))],
        height=8,
        width=12,
        guidance_scale=4.0,
        cfg_truncation=0.3,
    )


def masked(count: int, tokens: int, width: int) -> dict[str, Any]:
    return dict(
        prompt_embeds=rows(count, tokens, width, seed=1),
        prompt_attention_mask=legible(count, tokens),
        negative_prompt_embeds=rows(count, tokens, width, seed=2),
        negative_prompt_attention_mask=legible(count, tokens, missing=2),
    )


def call_lumina2(count: int) -> dict[str, Any]:
    """The last step has no guidance."""
    return COMMON | masked(count, 7, 32) | dict(height=16, width=16, guidance_scale=4.0, cfg_trunc_ratio=0.7)


def call_pixart(count: int) -> dict[str, Any]:
    return (
        COMMON
        | prompts(count)
        | dict(
            height=16, width=24, guidance_scale=4.5, max_sequence_length=9, clean_caption=False,
            use_resolution_binning=False,
        )
    )  # fmt: skip


def call_sana(count: int) -> dict[str, Any]:
    return (
        COMMON
        | masked(count, 7, 20)
        | dict(negative_prompt=None, height=32, width=64, guidance_scale=4.5, use_resolution_binning=False)
    )


CASES = [
    Guided(name="Chroma", build=build_chroma, call=call_chroma, source="tests/zoo/chroma.py with 16 channels"),
    Guided(name="Z-Image", build=build_z_image, call=call_z_image, source="tests/zoo/z_image.py"),
    Guided(name="Lumina-Image 2.0", build=build_lumina2, call=call_lumina2, source="tests/zoo/lumina2.py"),
    Guided(name="PixArt-sigma", build=build_pixart, call=call_pixart, source="tests/zoo/pixart.py"),
    Guided(
        name="Sana",
        build=build_sana,
        call=call_sana,
        source="tests/zoo/sana.py; diffusers, tests/pipelines/sana/test_sana.py for the VAE",
    ),
]
