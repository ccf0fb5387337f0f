"""LTX-Video, and LTX-2 with sound: two outputs, each with guidance of its own."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import NO_TEXT, STEPS, assemble, legible, made, picture, prompts, rows
from tests.pipelines import _t5, _t5_tokenizer
from tests.zoo.ltx import LTX, LTX2, LTX23

VAE: dict[str, Any] = dict(
    latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
    decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
    decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
    timestep_conditioning=False, patch_size=8, patch_size_t=1,
)  # fmt: skip
AUDIO_VAE: dict[str, Any] = dict(
    base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32, latent_channels=2,
    mid_block_add_attention=False, mel_bins=8,
)  # fmt: skip
CONNECTORS: dict[str, Any] = dict(
    caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2,
    video_connector_attention_head_dim=8, video_connector_num_layers=1, video_connector_num_learnable_registers=None,
    audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
    audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_theta=10000.0,
    rope_double_precision=False, causal_temporal_positioning=False,
)  # fmt: skip
CONNECTORS23 = CONNECTORS | dict(
    video_connector_num_attention_heads=3, audio_connector_num_attention_heads=3, audio_connector_attention_head_dim=4,
    per_modality_projections=True, video_hidden_dim=24, audio_hidden_dim=12,
)  # fmt: skip


def build(pipeline: str = "LTXPipeline") -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, timestep_conditioning=False,
    )  # fmt: skip
    return assemble(
        pipeline,
        transformer=made("LTXVideoTransformer3DModel", LTX, caption_channels=32),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=_t5("T5"),
        tokenizer=_t5_tokenizer(),
    )


def build_2(transformer: dict[str, Any] = LTX2, connectors: dict[str, Any] = CONNECTORS) -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return assemble(
        "LTX2Pipeline",
        transformer=diffusers.LTX2VideoTransformer3DModel(**transformer),
        vae=diffusers.AutoencoderKLLTX2Video(**VAE),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(**AUDIO_VAE),
        connectors=LTX2TextConnectors(**connectors),
        vocoder=vocoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **NO_TEXT,
    )


def call(count: int) -> dict[str, Any]:
    """2 x 2 x 3 tokens."""
    return prompts(count) | dict(
        height=64, width=96, num_frames=9, num_inference_steps=STEPS, guidance_scale=3.0, guidance_rescale=0.5,
        max_sequence_length=9, output_type="latent",
    )  # fmt: skip


def call_2(count: int) -> dict[str, Any]:
    """Guidance by text alone. The states of all layers of the text encoder, one after another, are its text."""
    return dict(
        prompt_embeds=rows(count, 8, 48, seed=1),
        prompt_attention_mask=legible(count, 8).flip(1),
        negative_prompt_embeds=rows(count, 8, 48, seed=2),
        negative_prompt_attention_mask=legible(count, 8, missing=2).flip(1),
        height=32,
        width=64,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        stg_scale=0.0,
        modality_scale=1.0,
        guidance_rescale=0.7,
        audio_guidance_scale=5.0,
        audio_stg_scale=0.0,
        audio_modality_scale=1.0,
        audio_guidance_rescale=0.7,
        spatio_temporal_guidance_blocks=None,
        use_cross_timestep=False,
        output_type="latent",
    )


def call_perturbed(count: int) -> dict[str, Any]:
    """Two more calls in every step: one with a perturbed block, one without attention between picture and sound."""
    return call_2(count) | dict(
        stg_scale=1.0, audio_stg_scale=1.0, modality_scale=3.0, audio_modality_scale=3.0,
        spatio_temporal_guidance_blocks=[1], use_cross_timestep=True,
    )  # fmt: skip


SOURCE2 = "tests/zoo/ltx.py; diffusers, tests/pipelines/ltx2/testing_utils.py for the rest"

CASES = [
    Guided(
        name="LTX-Video",
        build=build,
        call=call,
        source="tests/zoo/ltx.py; diffusers, tests/pipelines/ltx/test_ltx.py for the VAE",
    ),
    Guided(
        name="LTX-Video: image to video",  # each picture is encoded by itself, with noise
        build=lambda: build("LTXImageToVideoPipeline"),
        call=lambda count: call(count) | dict(image=[picture(64, 96, seed=i) for i in range(count)]),
        source="as above",
    ),
    Guided(name="LTX-2", build=build_2, call=call_2, source=SOURCE2),
    Guided(
        name="LTX-2.3: four branches",
        build=lambda: build_2(LTX23, CONNECTORS23),
        call=call_perturbed,
        source=SOURCE2,
    ),
]
