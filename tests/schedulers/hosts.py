"""The tiniest pipelines that schedulers are tried in: each family's way of calling them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from tests.guided import cogvideox, sd3, stable_diffusion, wan
from tests.guided.image import SANA_VAE
from tests.guided.parts import NO_TEXT, STEPS, assemble, legible, made, prompts, rows
from tests.pipelines import _clip, _clip_tokenizer, _t5, _t5_tokenizer
from tests.zoo import sana
from tests.zoo.helios import CONFIG as HELIOS


@dataclass(frozen=True, kw_only=True)
class Host:
    """A pipeline whose scheduler is swapped, and the layout in which two ranks share its work."""

    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    """Keywords of `__call__` without a generator, for the latents."""
    degrees: Mapping[str, int]
    """Of two ranks."""


CFG, ULYSSES = dict(cfg=2, ulysses=1), dict(ulysses=2)


def build_sd() -> Any:
    return stable_diffusion.build(diffusers.DDIMScheduler(**stable_diffusion.BETAS, clip_sample=False, steps_offset=1))


def call_sd() -> dict[str, Any]:
    return stable_diffusion.call(1)


def call_sd3() -> dict[str, Any]:
    return sd3.call(1)


def call_wan() -> dict[str, Any]:
    return wan.call(1)


def call_cogvideox() -> dict[str, Any]:
    return cogvideox.call(1)


def build_prior() -> Any:
    """The prior of Kandinsky 2.2, which gives image embeddings."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=12, image_size=8, projection_dim=12, intermediate_size=16, num_attention_heads=2, num_channels=3,
        num_hidden_layers=2, patch_size=4,
    )  # fmt: skip
    return assemble(
        "KandinskyV22PriorPipeline",
        prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=16,
            additional_embeddings=4,
        ),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        text_encoder=_clip(12, projection=12),
        tokenizer=_clip_tokenizer(),
        scheduler=diffusers.UnCLIPScheduler(),
        image_processor=transformers.CLIPImageProcessorPil(),
    )  # fmt: skip


def call_prior() -> dict[str, Any]:
    return dict(prompt=["a cat"], num_inference_steps=STEPS, guidance_scale=4.0)


def build_cascade() -> Any:
    """The decoder of Stable Cascade, which is told the noise as a ratio."""
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel  # it is not exported

    return assemble(
        "StableCascadeDecoderPipeline",
        decoder=diffusers.StableCascadeUNet(  # type: ignore[attr-defined]
            in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=(8, 16), num_attention_heads=(-1, 2),
            down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1), clip_text_pooled_in_channels=8, dropout=(0.0, 0.0), effnet_in_channels=4,
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
        ),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=4),
        text_encoder=_clip(8, projection=8),
        tokenizer=_clip_tokenizer(),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def call_cascade() -> dict[str, Any]:
    return prompts(1) | dict(
        image_embeddings=rows(1, 4, 2, 3, seed=1), num_inference_steps=STEPS, guidance_scale=2.0, output_type="latent"
    )


def build_helios(*, is_distilled: bool = False) -> Any:
    """Three stages, each at twice the size of the one before."""
    return assemble(
        "HeliosPyramidPipeline",
        transformer=made("HeliosTransformer3DModel", HELIOS, text_dim=32, in_channels=16, out_channels=16),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.HeliosScheduler(),
        text_encoder=_t5("UMT5"),
        tokenizer=_t5_tokenizer(),
        is_distilled=is_distilled,
    )


def build_helios_distilled() -> Any:
    """It hands its scheduler the noise of the stage."""
    return build_helios(is_distilled=True)


def call_helios() -> dict[str, Any]:
    return prompts(1) | dict(
        height=64, width=64, num_frames=9, pyramid_num_inference_steps_list=[1, 1, 2], guidance_scale=5.0,
        max_sequence_length=9, history_sizes=[4, 2, 1], num_latent_frames_per_chunk=3, output_type="latent",
    )  # fmt: skip


def build_sprint() -> Any:
    """SANA-Sprint: the guidance is an argument of the transformer."""
    return assemble(
        "SanaSprintPipeline",
        transformer=made("SanaTransformer2DModel", sana.SANA, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        vae=diffusers.AutoencoderDC(**SANA_VAE),
        scheduler=diffusers.SCMScheduler(),
        **NO_TEXT,
    )


def call_sprint() -> dict[str, Any]:
    return dict(
        prompt_embeds=rows(1, 7, 20, seed=1), prompt_attention_mask=legible(1, 7), height=32, width=64,
        num_inference_steps=2, use_resolution_binning=False, output_type="latent",
    )  # fmt: skip


def build_amused() -> Any:
    return assemble(
        "AmusedPipeline",
        transformer=diffusers.UVit2DModel(
            hidden_size=8, use_bias=False, hidden_dropout=0.0, cond_embed_dim=8, micro_cond_encode_dim=2,
            micro_cond_embed_dim=10, encoder_hidden_size=8, vocab_size=32, codebook_size=8, in_channels=8,
            block_out_channels=8, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
            num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.0, intermediate_size=8,
            layer_norm_eps=1e-06, ln_elementwise_affine=True,
        ),
        vqvae=diffusers.VQModel(
            act_fn="silu", block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), in_channels=3,
            latent_channels=8, layers_per_block=1, norm_num_groups=8, num_vq_embeddings=8, out_channels=3,
            sample_size=8, up_block_types=("UpDecoderBlock2D",), mid_block_add_attention=False,
            lookup_from_codebook=True,
        ),
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
        text_encoder=_clip(8, projection=8),
        tokenizer=_clip_tokenizer(),
    )  # fmt: skip


def call_amused() -> dict[str, Any]:
    return prompts(1) | dict(height=4, width=4, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent")


HOSTS = {
    "Stable Diffusion": Host(build=build_sd, call=call_sd, degrees=CFG),
    "Stable Diffusion 3": Host(build=sd3.build, call=call_sd3, degrees=ULYSSES),
    "Wan": Host(build=wan.build, call=call_wan, degrees=CFG),
    "CogVideoX": Host(build=cogvideox.build, call=call_cogvideox, degrees=ULYSSES),
    "Kandinsky 2.2 prior": Host(build=build_prior, call=call_prior, degrees=CFG),
    "Stable Cascade decoder": Host(build=build_cascade, call=call_cascade, degrees=CFG),
    "Helios": Host(build=build_helios, call=call_helios, degrees=ULYSSES),
    "Helios, distilled": Host(build=build_helios_distilled, call=call_helios, degrees=ULYSSES),
    "SANA-Sprint": Host(build=build_sprint, call=call_sprint, degrees=ULYSSES),
    "aMUSEd": Host(build=build_amused, call=call_amused, degrees=CFG),
}
