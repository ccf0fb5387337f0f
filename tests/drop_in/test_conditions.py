"""Pictures that steer a pipeline, what goes into it and comes out: every way that diffusers takes and gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import parafuse
from parafuse.engine.verify import relative_error
from tests.dist.ranks import run_ranks
from tests.drop_in.stories import EXACT, SHOWS, shared
from tests.guided import flux, sd3, sdxl, wan
from tests.guided.cells import seeded, tensors
from tests.guided.parts import assemble, made, picture
from tests.guided.stable_diffusion import BETAS, UNET
from tests.pipelines import _clip, _clip_tokenizer, _t5, _t5_tokenizer, _vae
from tests.zoo.sd3 import SD3
from tests.zoo.wan import WAN

Make = Callable[[], tuple[Any, dict[str, Any], dict[str, Any]]]
"""A pipeline, its call, and what is different in a call whose picture must be another."""
TWO = dict(num_inference_steps=2)


def painting(width: int, height: int, seed: int = 5) -> dict[str, Any]:
    return dict(image=picture(height, width, seed=seed))


def flux_control() -> Any:
    """Two ControlNets, each shallower than the model, at scales of their own."""
    nets = [made("FluxControlNetModel", flux.CONFIG, num_layers=1, num_single_layers=1) for _ in range(2)]
    pipeline = flux.build("FluxControlNetPipeline", controlnet=diffusers.FluxMultiControlNetModel(nets))
    call = flux.call(2) | TWO | dict(true_cfg_scale=1.0, controlnet_conditioning_scale=[0.7, 0.4])
    pictures = [picture(8, 12, seed=seed) for seed in (1, 2)]
    return pipeline, call | dict(control_image=pictures), dict(controlnet_conditioning_scale=[0.0, 0.4])


def sd3_control() -> Any:
    """Residuals for every second block."""
    config = SD3 | dict(pooled_projection_dim=24)
    controlnet = made("SD3ControlNetModel", config, num_layers=2, extra_conditioning_channels=0)
    pipeline = sd3.build("StableDiffusion3ControlNetPipeline", controlnet=controlnet)
    call = sd3.call(2) | TWO | dict(width=16, control_image=picture(8, 16))
    return pipeline, call, dict(control_image=picture(8, 16, seed=6))


def t2i_adapter() -> Any:
    """Features are added inside of blocks with attention."""
    blocks: dict[str, Any] = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    adapter = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    pipeline = assemble(
        "StableDiffusionAdapterPipeline",
        unet=diffusers.UNet2DConditionModel(**UNET | blocks),
        vae=_vae(),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        adapter=adapter,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    call = (
        sdxl.call_text(2) | TWO | dict(adapter_conditioning_scale=0.8, image=[picture(16, 24, seed=i) for i in (1, 2)])
    )
    return pipeline, call, dict(adapter_conditioning_scale=0.1)


def sdxl_control() -> Any:
    return sdxl.build_controlled(), sdxl.call_controlled(2) | TWO, dict(controlnet_conditioning_scale=0.2)


def sdxl_inpaint() -> Any:
    return sdxl.build("StableDiffusionXLInpaintPipeline"), sdxl.call_inpaint(2) | TWO, painting(24, 16, 6)


def flux_image() -> Any:
    call = flux.call(2) | dict(image=picture(8, 12), strength=0.7, num_inference_steps=4, true_cfg_scale=1.0)
    return flux.build("FluxImg2ImgPipeline"), call, dict(strength=0.4)


def flux_inpaint() -> Any:
    from PIL import Image

    mask = Image.new("L", (12, 8))
    mask.paste(255, (4, 0, 12, 8))
    call = flux.call(2) | dict(image=picture(8, 12), mask_image=mask, strength=0.9, num_inference_steps=3)
    return flux.build("FluxInpaintPipeline"), call | dict(true_cfg_scale=1.0), painting(12, 8, 6)


def wan_video() -> Any:
    """Of 4 steps the last 2."""
    pipeline = assemble(
        "WanVideoToVideoPipeline",
        transformer=made("WanTransformer3DModel", WAN, text_dim=32, in_channels=16, out_channels=16),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=_t5("UMT5"),
        tokenizer=_t5_tokenizer(),
    )
    call = {name: value for name, value in wan.call(1).items() if name != "num_frames"}
    call |= dict(video=[picture(32, 48, seed=i) for i in range(5)], num_inference_steps=4, strength=0.5)
    return pipeline, call, dict(strength=0.75)


CONDITIONS: dict[str, tuple[Make, tuple[dict[str, int], ...]]] = {
    "FLUX.1: two ControlNets": (flux_control, (dict(ulysses=2),)),
    "Stable Diffusion 3: ControlNet": (sd3_control, (dict(ulysses=2), dict(cfg=2, ulysses=1))),
    "Stable Diffusion XL: ControlNet": (sdxl_control, (dict(data=2, ulysses=1),)),
    "Stable Diffusion XL: inpainting": (sdxl_inpaint, (dict(cfg=2, ulysses=1),)),
    "Stable Diffusion: T2I-Adapter": (t2i_adapter, (dict(cfg=2, ulysses=1), dict(data=2, ulysses=1))),
    "FLUX.1: image to image": (flux_image, (dict(ulysses=2),)),
    "FLUX.1: inpainting": (flux_inpaint, (dict(ring=2, ulysses=1),)),
    "Wan 2.1: video to video": (wan_video, (dict(ulysses=2), dict(cfg=2, ulysses=1))),
}


def painted(run: Any, call: dict[str, Any]) -> list[Tensor]:
    """Some pipelines encode a picture with noise of torch's own generator."""
    torch.manual_seed(0)
    return tensors(run(**seeded(call)))


def conditioned() -> dict[str, tuple[float, float, int, bool]]:
    """By condition and layout: (error of two requests, what the condition changes, work that was shared, whether the
    pipeline is plain again)."""
    found = {}
    for name, (make, layouts) in CONDITIONS.items():
        pipeline, call, other = make()
        want, changed = (painted(pipeline, call | more) for more in ({}, other))
        for degrees in layouts:
            config = parafuse.Config(parallel=parafuse.Parallel(**degrees))
            with parafuse.Engine.from_pipeline(pipeline, config) as engine:
                wrong = max(relative_error(painted(engine, call), want) for _ in range(2))
                wrong = max(wrong, relative_error(painted(engine, call | other), changed))
                work = shared(engine)
            is_plain = all(map(torch.equal, painted(pipeline, call), want))
            found[f"{name}, {degrees}"] = (wrong, relative_error(changed, want), work, is_plain)
    return found


def test_conditions() -> None:
    for found in run_ranks(conditioned, 2, timeout_s=200):
        for name, (wrong, change, work, is_plain) in found.items():
            assert wrong <= EXACT < SHOWS < change, name
            assert work > 2, name
            assert is_plain, name


def kinds(output: Any) -> list[str]:
    """Types of an output, as far as a user sees them."""
    first = output[0]
    item = first[0] if isinstance(first, list) else first
    return [type(output).__name__, type(first).__name__, type(item).__module__.split(".")[0]]


def arrays(output: Any) -> list[Tensor]:
    """Of pictures too."""
    first = output[0]
    if isinstance(first, list):
        return [torch.from_numpy(np.asarray(one).astype(np.float32) / 255) for one in first]
    return tensors(output)


def inputs_of(pipeline: Any) -> dict[str, Any]:
    """Embeddings that a user has made himself, and noise of his own."""
    names = "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds".split()
    made = pipeline.encode_prompt(
        prompt=["a cat", "the apple"], negative_prompt=["red", ""], device="cpu", num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )  # fmt: skip
    return dict(zip(names, made, strict=True))


def exchanged_values() -> dict[str, list[Any]]:
    """By degrees and form: (error, whether the types are those of plain diffusers)."""
    plain, under = sdxl.build(), sdxl.build()
    call = sdxl.call_text(2) | TWO
    given = {name: value for name, value in call.items() if "prompt" not in name} | inputs_of(plain)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    forms = {
        **{kind: call | dict(output_type=kind) for kind in ("latent", "pt", "np", "pil")},
        "tuple": call | dict(return_dict=False, output_type="np"),
        "embeddings": given,
        "latents": call | dict(latents=latents),
        "several of each": call | dict(num_images_per_prompt=2),
    }
    found: dict[str, list[Any]] = {}
    for degrees in (dict(cfg=2, ulysses=1), dict(data=2, ulysses=1)):
        with parafuse.Engine.from_pipeline(under, parafuse.Config(parallel=parafuse.Parallel(**degrees))) as engine:
            for name, form in forms.items():
                want, got = plain(**seeded(form)), engine(**seeded(form))
                wrong = relative_error(arrays(got), arrays(want))
                found[f"{name}, {degrees}"] = [wrong, kinds(got) == kinds(want), EXACT if name != "pil" else 1.01 / 255]
            halfway = engine(**seeded(call | dict(denoising_end=0.5))).images
            end = engine(**seeded(call | dict(latents=halfway, denoising_end=None))).images
            wants = plain(**seeded(call | dict(latents=plain(**seeded(call | dict(denoising_end=0.5))).images))).images
            found[f"latents out and in, {degrees}"] = [relative_error([end], [wants]), type(halfway) is Tensor, EXACT]
    return found


def test_what_goes_in_and_comes_out() -> None:
    for found in run_ranks(exchanged_values, 2, timeout_s=200):
        for name, (wrong, alike, allowed) in found.items():
            assert wrong <= allowed, name
            assert alike, name


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[str, ...], dict[str, int]]] = {
    "Stable Diffusion 3": (sd3.build, sd3.call(1), ("latents", "prompt_embeds"), dict(cfg=2, ulysses=1)),
    "Stable Diffusion XL": (sdxl.build, sdxl.call_text(2), ("latents", "prompt_embeds"), dict(data=2, ulysses=1)),
    "FLUX.1": (lambda: flux.build("FluxPipeline"), flux.call(1), ("latents",), dict(cfg=2, ulysses=1)),
    "FLUX.1, split": (lambda: flux.build("FluxPipeline"), flux.call(2), ("latents", "prompt_embeds"), dict(ulysses=2)),
    "Wan 2.1": (wan.build, wan.call(1), ("latents", "prompt_embeds"), dict(cfg=2, ulysses=1)),
}


class Recorder:
    """A callback that looks at every value, and changes latents and prompts after the first step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.types: set[type] = set()

    def __call__(self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.types |= {type(value) for value in values.values()}
        self.seen += [value.detach().clone() for value in values.values()]
        if step:
            return {}
        values["latents"].mul_(1.25)
        return {name: value if name == "latents" else value * 0.5 for name, value in values.items()}

    def legacy(self, step: int, timestep: Any, latents: Tensor) -> None:
        self.types.add(type(latents))
        self.seen.append(latents.clone())
        latents.add_(0.1)


def called_back() -> dict[str, tuple[float, float, float, bool]]:
    """By case: (error of the picture, error of what the callback saw, what it changed, whether all were tensors)."""
    found = {}
    for name, (build, call, wanted, degrees) in CASES.items():
        plain, under = build(), build()
        config = parafuse.Config(parallel=parafuse.Parallel(**degrees))
        bare = tensors(plain(**seeded(call)))
        with parafuse.Engine.from_pipeline(under, config) as engine:
            for kind in ("new", *(["legacy"] if name == "Stable Diffusion XL" else [])):
                recorders = Recorder(), Recorder()
                pictures = []
                for recorder, run in zip(recorders, (plain, engine), strict=True):
                    keywords = (
                        dict(callback_on_step_end=recorder, callback_on_step_end_tensor_inputs=list(wanted))
                        if kind == "new"
                        else dict(callback=recorder.legacy, callback_steps=1)
                    )
                    pictures.append(tensors(run(**seeded(call | keywords))))
                found[f"{name}, {kind}"] = (
                    relative_error(pictures[1], pictures[0]),
                    relative_error(recorders[1].seen, recorders[0].seen),
                    relative_error(pictures[0], bare),
                    recorders[1].types == {Tensor},
                )
    return found


def test_callbacks_see_whole_tensors_and_may_change_them() -> None:
    for found in run_ranks(called_back, 2, timeout_s=200):
        for name, (wrong, seen, change, are_tensors) in found.items():
            assert max(wrong, seen) <= EXACT < SHOWS < change, name
            assert are_tensors, name
