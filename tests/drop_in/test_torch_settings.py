"""What a user sets in torch around an engine: it works under it, and is left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor

import parafuse
from tests import models
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, attempt
from tests.drop_in.test_modular import config, seeded
from tests.guided import flux, sdxl
from tests.models import error


def settings() -> dict[str, Any]:
    """All that torch keeps for the process and that parafuse could change."""
    cudnn = torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            getattr(torch.utils.deterministic, "fill_uninitialized_memory"),  # noqa: B009
        ),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "cudnn": [getattr(cudnn, name) for name in ("enabled", "allow_tf32", "benchmark", "deterministic")],
        "reductions": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "attention": [
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@contextmanager
def unusual() -> Any:
    """Everything other than torch's default."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(True)


def kept_as_found() -> dict[str, Any]:
    """A request that ends well, one that is refused and one that fails, under every mode of autograd."""
    ranks, values = dist.get_world_size(), sdxl.call_text(2) | {"num_inference_steps": 2}
    found: dict[str, Any] = {"errors": [], "changed": []}

    def step(what: str, act: Callable[[], Any]) -> Any:
        before = settings()
        result = act()
        after = settings()
        found["changed"] += [
            f"{what}: {name} {before[name]} -> {after[name]}" for name in after if after[name] != before[name]
        ]
        return result

    pipeline = sdxl.build()
    want = pipeline(**values, **seeded()).images

    def paint(engine: parafuse.Engine, **changes: Any) -> Tensor:
        return engine(**values | changes, **seeded()).images

    def use(engine: parafuse.Engine) -> None:
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                got = step(mode.__name__, lambda: paint(engine))
            found["errors"].append(error(got.clone(), want))
        found["refused"] = step("refused", lambda: attempt(lambda: paint(engine, num_inference_steps=0)))
        wrong = {"prompt": None, "negative_prompt": None, "prompt_embeds": torch.zeros(1, 2, 3)}
        found["fails"] = step("fails", lambda: attempt(lambda: paint(engine, **wrong)))
        found["errors"].append(error(paint(engine), want))
        step("close", engine.close)

    with unusual():
        for layout in ({"cfg": ranks}, {"data": ranks}):
            use(step("engine", lambda layout=layout: parafuse.Engine.from_pipeline(pipeline, config(**layout))))
    return found


def test_settings_are_kept_and_obeyed() -> None:
    for ranks in (1, 2):
        for found in run_ranks(kept_as_found, ranks):
            assert max(found["errors"]) <= EXACT
            assert found["changed"] == []
            assert "num_inference_steps=0" in found["refused"]
            assert found["fails"]


def strides(module: Any) -> set[bool]:
    return {w.is_contiguous(memory_format=torch.channels_last) for w in module.parameters() if w.ndim == 4}


def channels_last() -> dict[str, Any]:
    """Before and after parafuse; what comes out lies in memory as without it."""
    ranks, values, found = dist.get_world_size(), sdxl.call_text(2), dict[str, Any]()
    seen: list[bool] = []
    values |= {
        "callback_on_step_end": lambda _, step, time, tensors: tensors,
        "output_type": "pt",
    }

    def noticed(pipeline: Any) -> tuple[Tensor, list[bool]]:
        """What is painted, and whether what the UNet and the VAE are given and give is channels-last."""
        seen.clear()
        parts = [pipeline.unet.conv_in, pipeline.unet.conv_out, pipeline.vae.decoder.conv_out]
        hooks = [
            part.register_forward_hook(lambda _, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
            for part in parts
        ]
        image = pipeline(**values, **seeded()).images
        for hook in hooks:
            hook.remove()
        return image, list(seen)

    pipeline = sdxl.build()
    first = pipeline(**values, **seeded()).images
    for layout in ({"cfg": ranks}, {"data": ranks}):
        for after in (False, True):
            pipeline = sdxl.build()
            if not after:
                pipeline.unet.to(memory_format=torch.channels_last)
                pipeline.vae.to(memory_format=torch.channels_last)
            with parafuse.apply(pipeline, config(**layout)):
                if after:
                    pipeline.unet.to(memory_format=torch.channels_last)
                    pipeline.vae.to(memory_format=torch.channels_last)
                image, formats = noticed(pipeline)
                found.setdefault("errors", []).append(error(image, first))
                found.setdefault("formats", set()).update(formats)
                found.setdefault("weights", set()).update(strides(pipeline.unet) | strides(pipeline.vae.decoder))
            found["weights"] |= strides(pipeline.unet)
            image, formats = noticed(pipeline)
            found["formats"] |= set(formats)
            found["errors"].append(error(image, first))
    return found


def test_channels_last() -> None:
    for ranks in (1, 2):
        for found in run_ranks(channels_last, ranks):
            assert max(found["errors"]) <= EXACT
            assert found["formats"] == {True}
            assert found["weights"] == {True}


class Graphs:
    """A backend that counts the graphs it is given, and their runs."""

    def __init__(self) -> None:
        self.made = self.runs = 0

    def __call__(self, module: Any, values: Any) -> Any:
        self.made += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return module(*args)

        return run


def small_unet() -> Any:
    blocks: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        mid_block_type=None, **blocks,
    )  # fmt: skip
    return unet.eval().requires_grad_(False)


def compiled_by_the_user() -> dict[str, Any]:
    """The VAE's decoder, a text encoder, the UNet as a whole and the blocks of a transformer, before and after."""
    torch.compiler.reset()
    ranks, found = dist.get_world_size(), dict[str, Any](errors={}, runs={})
    values = sdxl.call_text(1) | {"output_type": "pt", "num_inference_steps": 2}
    want = sdxl.build()(**values, **seeded()).images
    pipeline, named = sdxl.build(), {"vae": Graphs(), "text": Graphs()}
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, backend=named["vae"])
    pipeline.text_encoder = torch.compile(pipeline.text_encoder, backend=named["text"])
    with parafuse.apply(pipeline, config(cfg=ranks)):
        found["errors"]["parts"] = error(pipeline(**values, **seeded()).images, want)
    found["runs"] |= {name: graphs.runs for name, graphs in named.items()}
    unet, graphs = small_unet(), Graphs()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 8)
    whole = unet(*inputs).sample
    with parafuse.apply(unet, config(cfg=ranks)):
        unet.compile(backend=graphs)
        for _ in range(3):
            found["errors"]["unet"] = error(unet(*inputs).sample, whole)
    found["runs"]["unet"], graphs.runs = graphs.runs, 0
    found["errors"]["removed"] = float(not torch.equal(unet(*inputs).sample, whole)) + graphs.runs
    pipeline = sdxl.build()
    pipeline.unet.compile(backend=Graphs())
    found["module.compile before"] = attempt(parafuse.apply, pipeline, config(cfg=ranks))
    pipeline = sdxl.build()
    pipeline.unet = torch.compile(pipeline.unet, backend=Graphs())
    found["torch.compile before"] = attempt(parafuse.apply, pipeline, config(cfg=ranks))
    model: Any = models.build("flux")
    values, graphs = models.inputs("flux", models.ODD), Graphs()
    whole = models.call(model, values)
    with parafuse.apply(model, config(data=ranks)):  # over the tokens: test_compile.py
        model.compile_repeated_blocks(backend=graphs)
        for _ in range(2):
            found["errors"]["blocks"] = error(models.call(model, values), whole)
    found["runs"]["blocks"] = graphs.runs
    pipeline = flux.build("FluxPipeline")
    pipeline.transformer.compile_repeated_blocks(backend=Graphs())
    found["blocks before"] = attempt(parafuse.apply, pipeline, config(ulysses=ranks))
    return found


def test_compile_by_the_user() -> None:
    """On one rank nothing of parafuse stands on a model."""
    for found in run_ranks(compiled_by_the_user, 2, timeout_s=120):
        assert max(found["errors"].values()) <= EXACT, found["errors"]
        assert all(found["runs"].values()), found["runs"]
        for name in ("module.compile before", "torch.compile before", "blocks before"):
            assert "is compiled; apply parafuse to the model before it is compiled" in found[name]
