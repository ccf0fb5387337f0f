"""What FLUX, SDXL and Wan have: steps of a call by themselves, what a call leaves to read, FreeU, fused weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.drop_in import lora, words_and_pictures
from tests.drop_in.script import Script, Scripts, bare, effect, picture, processors, read, unchanged

PROMPTS = ["a cat", "the red apple"]
SINGLE_FILE = Script(
    run=lambda x, _: x.from_single_file("model.safetensors"),
    refused=dict.fromkeys((1, 2), "Engine.from_pretrained takes the file"),
)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def fault(x: Any, *args: Any, **kwargs: Any) -> str:
    """What the pipeline says of a wrong call."""
    try:
        x.check_inputs(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def properties(names: str) -> Scripts:
    return {name: read(name) for name in names.split()}


def of_calls(encode: dict[str, Any], latents: tuple[Any, ...], wrong: tuple[Any, ...]) -> Scripts:
    """The parts of a call, which a user may take one by one."""

    def encode_prompt(x: Any, _: Path) -> Any:
        return x.encode_prompt(PROMPTS, **encode)

    def prepare_latents(x: Any, _: Path) -> Any:
        return x.prepare_latents(*latents, torch.float32, torch.device("cpu"), noise())

    def check_inputs(x: Any, _: Path) -> Any:
        assert fault(x, *wrong)
        return fault(x, *wrong)

    return {run.__name__: Script(run=run, is_read=True) for run in (encode_prompt, prepare_latents, check_inputs)}


def flux() -> Scripts:
    return (
        lora.scripts("transformer", "text_encoder")
        | words_and_pictures.scripts()
        | of_calls(
            dict(prompt_2=None, max_sequence_length=9), (2, 4, 8, 12), ("a", None, 8, 12, None, None, torch.zeros(1))
        )
        | properties("current_timestep guidance_scale interrupt joint_attention_kwargs num_timesteps")
        | properties("text_encoder_name transformer_name")
        | {"from_single_file": SINGLE_FILE}
    )


def enable_freeu(x: Any, _: Path) -> Any:
    return effect(x, lambda: x.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2), undo=x.disable_freeu)


def fuse_qkv_projections(x: Any, _: Path) -> Any:
    return unchanged(x, x.fuse_qkv_projections, lambda: processors(x))


def unfuse_qkv_projections(x: Any, _: Path) -> Any:
    x.fuse_qkv_projections()
    picture(x)
    return unchanged(x, x.unfuse_qkv_projections, lambda: processors(x))


def upcast_vae(x: Any, _: Path) -> Any:
    bare(x).vae.to(torch.bfloat16)
    x.upcast_vae()
    return [x.vae.dtype, picture(x)]


def sdxl() -> Scripts:
    changes = {run.__name__: Script(run=run) for run in (fuse_qkv_projections, unfuse_qkv_projections, upcast_vae)}
    freeu = Script(run=enable_freeu)
    return (
        lora.scripts("unet", "text_encoder")
        | words_and_pictures.scripts()
        | of_calls(dict(negative_prompt=["a", "the"]), (2, 4, 16, 24), ("a", None, 15, 24, None))
        | properties("clip_skip cross_attention_kwargs denoising_end do_classifier_free_guidance guidance_rescale")
        | properties("guidance_scale interrupt num_timesteps text_encoder_name unet_name")
        | changes
        | {
            "enable_freeu": freeu,
            "disable_freeu": freeu,
            "from_single_file": SINGLE_FILE,
            "get_guidance_scale_embedding": Script(
                run=lambda x, _: x.get_guidance_scale_embedding(torch.tensor([5.0]), 8), is_read=True
            ),
            "prepare_extra_step_kwargs": Script(
                run=lambda x, _: sorted(x.prepare_extra_step_kwargs(None, 0.5)), is_read=True
            ),
        }
    )


def wan() -> Scripts:
    return (
        lora.scripts("transformer")
        | of_calls(dict(negative_prompt=["a", "the"], max_sequence_length=9), (2, 4, 32, 48, 5), ("a", None, 31, 48))
        | properties("attention_kwargs current_timestep do_classifier_free_guidance guidance_scale interrupt")
        | properties("num_timesteps transformer_name")
    )
