"""Weights that diffusers' quantizers, or their libraries, have packed: the same picture in every layout, still packed.

bitsandbytes' layers run on the CPU, but diffusers' own quantizer for them asks for a GPU: here they are put in by hand.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.errors import ConfigError
from tests import pipelines
from tests.dist.ranks import run_ranks

CALL: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "cat", "width": 32, "height": 24, "num_inference_steps": 2,
    "max_sequence_length": 16, "output_type": "latent",
}  # fmt: skip
LAYOUTS: tuple[dict[str, int], ...] = ({"ulysses": 2}, {"cfg": 2}, {"ring": 2}, {"data": 2})
LIBRARIES = {"torchao": "torchao", "quanto": "optimum", "gguf": "gguf", "nf4": "bitsandbytes", "int8": "bitsandbytes"}
KINDS = ("torchao", "torchao, saved", "quanto", "quanto, saved", "gguf", "nf4", "int8")
EVERYWHERE = ("torchao", "int8")
"""Kinds that are tried in all layouts."""
PACKED = {"torchao": "Int8Tensor", "quanto": "WeightQBytesTensor", "gguf": "GGUFParameter", "nf4": "Params4bit",
          "int8": "Int8Params"}  # fmt: skip


def needs(kind: str) -> None:
    """Skips, with the reason, where the library of a kind is not installed."""
    module = LIBRARIES[kind.partition(",")[0]]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{kind} needs {module}, which is not installed")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose widths are multiples of 64, the largest block of these formats."""
    import diffusers

    here = tmp_path_factory.mktemp("quantized")
    pipelines.sd3(here / "folder")
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=24,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    transformer.save_pretrained(here / "folder" / "transformer")
    return here


def config_of(kind: str) -> Any:
    """diffusers' configuration of the transformer's quantization."""
    import diffusers

    if kind == "quanto":
        return diffusers.QuantoConfig("int8")
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


def given_for(kind: str, here: Path) -> tuple[str, dict[str, Any]]:
    """What to load, and the keywords beside it."""
    import diffusers

    kind, _, saved = kind.partition(", ")
    if saved:
        return str(here / kind), {}
    if kind in ("torchao", "quanto"):
        wish = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config_of(kind)})
        return str(here / "folder"), {"quantization_config": wish}
    if kind == "gguf":
        transformer = diffusers.SD3Transformer2DModel.from_single_file(
            str(here / "x.gguf"),
            config=str(here / "folder" / "transformer"),
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )
    else:
        transformer = _packed(diffusers.SD3Transformer2DModel.from_pretrained(here / "folder" / "transformer"), kind)
    return str(here / "folder"), {"transformer": transformer}


def _packed(model: Any, kind: str) -> Any:
    """The model with bitsandbytes' linear layers in its blocks."""
    import bitsandbytes as bnb

    for name, layer in list(model.transformer_blocks.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        weight = layer.weight.data
        if kind == "nf4":
            new: Any = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            make: Any = bnb.nn.Params4bit  # whose __new__ takes other arguments than its __init__ says
            new.weight = make(weight, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            make = bnb.nn.Int8Params
            new.weight = make(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        model.transformer_blocks.set_submodule(name, new.to("cpu").eval())  # in training, int8 packs anew in every call
    return model


def _write_gguf(here: Path) -> None:
    """The transformer in 8 bits, under diffusers' names."""
    import gguf
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(str(here / "x.gguf"), "sd3")
    for name, x in load_file(here / "folder" / "transformer" / "diffusion_pytorch_model.safetensors").items():
        is_packed = x.ndim == 2 and x.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if is_packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(x.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _prepare(kind: str, here: Path) -> None:
    """Files that a kind is loaded from."""
    from diffusers import DiffusionPipeline

    kind, _, saved = kind.partition(", ")
    if kind == "gguf":
        _write_gguf(here)
    if saved:
        folder, given = given_for(kind, here)
        DiffusionPipeline.from_pretrained(folder, **given).save_pretrained(here / kind)


def painted(kind: str, here: Path, layouts: tuple[dict[str, int], ...]) -> list[dict[str, Any]]:
    """For every layout latents, how the weights are kept, and what is said of them."""
    found: list[dict[str, Any]] = []
    for layout in layouts:
        model, given = given_for(kind, here)
        config = parafuse.Config(parallel=parafuse.Parallel(**layout), dtype="auto")
        with parafuse.Engine.from_pretrained(model, config, **given) as engine:
            images = 2 if "data" in layout else 1
            latents = engine(**CALL, seed=7, num_images_per_prompt=images).images
            weight = engine.pipeline.transformer.transformer_blocks[0].attn.to_q.weight
            found.append({
                "latents": latents, "kept": type(weight).__name__, "plan": engine.plan.dtype,
                "weights": engine.receipt["weights"]["transformer"], "exchanged": sum(
                    one["calls"] for one in engine.receipt["exchanged"].values()),
            })  # fmt: skip
    return found


def plain(kind: str, here: Path, images: int = 1) -> Tensor:
    from diffusers import DiffusionPipeline

    model, given = given_for(kind, here)
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float32, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**CALL, generator=torch.Generator().manual_seed(7), num_images_per_prompt=images).images


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_paint_the_same_in_every_layout(kind: str, here: Path) -> None:
    needs(kind)
    _prepare(kind, here)
    expected = {images: plain(kind, here, images) for images in (1, 2)}
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(here / "folder")
    unpacked = pipeline(**CALL, generator=torch.Generator().manual_seed(7)).images
    assert 1e-4 < (expected[1] - unpacked).abs().max() < 0.5, "control: something was packed, and is near"
    alone = painted(kind, here, ({},))
    assert torch.equal(alone[0]["latents"], expected[1])
    layouts = LAYOUTS if kind in EVERYWHERE else LAYOUTS[:2]
    together = [one for rank in run_ranks(painted, 2, kind, here, layouts) for one in rank]
    assert len(together) == 2 * len(layouts)
    for one in together:
        whole = expected[len(one["latents"])]
        assert (one["latents"] - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert one["exchanged"] > 0
    for one in (*alone, *together):
        assert one["kept"] == PACKED[kind.partition(",")[0]], "it was unpacked"
        assert one["plan"] == "float32"
        method = {"nf4": "", "int8": ""}.get(kind, f", {kind.partition(',')[0]}")
        assert one["weights"] == f"float32{method}"


def test_a_pipeline_with_packed_weights_that_is_loaded_already(here: Path) -> None:
    """Its first parameters may be bytes; what it computes in is another thing."""
    needs("nf4")
    from diffusers import DiffusionPipeline

    model, given = given_for("nf4", here)
    blocks = given["transformer"].transformer_blocks
    given["transformer"].register_parameter("first", blocks[0].attn.to_q.weight)
    given["transformer"]._parameters = dict(reversed(given["transformer"]._parameters.items()))
    pipeline: Any = DiffusionPipeline.from_pretrained(model, **given)
    assert next(pipeline.transformer.parameters()).dtype == torch.uint8
    with parafuse.Engine.from_pipeline(pipeline) as engine:
        assert engine.plan.dtype == "float32"


def test_what_cannot_be_sent_or_had_is_said_before_ranks_start(here: Path) -> None:
    needs("gguf")
    _prepare("gguf", here)
    model, given = given_for("gguf", here)
    with pytest.raises(ConfigError, match=r"transformer: cannot be sent to the ranks .* start all ranks with torchrun"):
        parafuse.Engine.from_pretrained(model, parafuse.Config(parallel=parafuse.Parallel(ulysses=2)), **given)
    with pytest.raises(ConfigError, match=r"holds one part of a model. In Python, give it beside a folder"):
        parafuse.Engine.from_pretrained(str(here / "x.gguf"))


def test_bitsandbytes_of_diffusers_itself_needs_a_gpu(here: Path) -> None:
    needs("nf4")
    import diffusers

    wish = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True}, components_to_quantize=["transformer"]
    )
    reason = "transformer with bitsandbytes_4bit: diffusers loads it on GPUs alone; use one, or torchao or GGUF."
    with pytest.raises(ConfigError, match=reason):
        parafuse.Engine.from_pretrained(str(here / "folder"), parafuse.Config(device="cpu"), quantization_config=wish)
    file = here / "folder" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    try:
        file.write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
        )
        with pytest.raises(
            ConfigError, match="transformer is quantized with bitsandbytes_8bit: diffusers loads it on GPUs"
        ):
            parafuse.Engine.from_pretrained(str(here / "folder"), parafuse.Config(device="cpu"))
    finally:
        file.write_text(json.dumps(config))
