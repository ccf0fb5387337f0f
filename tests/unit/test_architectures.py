"""Architectures without weights: true sizes, tiny forms that paint, and modules as diffusers would have loaded them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parafuse import Engine
from parafuse.engine import random_weights
from parafuse.engine.architecture import architectures, read_architecture
from parafuse.engine.loader import load_pipeline
from parafuse.engine.random_weights import build_part
from parafuse.engine.source import locate
from parafuse.engine.targets import DENOISERS
from parafuse.errors import ConfigError, ModelError

CPU, META = torch.device("cpu"), torch.device("meta")
NAMES = architectures()
PROMPT = "a red apple"
QWEN_VL, WAN, UMT5 = {"text_encoder": 8.29, "vae": 0.127}, 14.29, 5.68
PUBLISHED: dict[str, dict[str, float]] = {
    "flux.1-dev": {"transformer": 11.90, "text_encoder": 0.123, "text_encoder_2": 4.76, "vae": 0.0838},
    "flux.2-dev": {"transformer": 32.2, "text_encoder": 24.0, "vae": 0.084},
    "flux.2-klein-4b": {"transformer": 3.88, "text_encoder": 4.02, "vae": 0.084},
    "hunyuanvideo": {"transformer": 12.8, "text_encoder": 7.50, "text_encoder_2": 0.123, "vae": 0.246},
    "qwen-image": {"transformer": 20.43, **QWEN_VL},
    "qwen-image-edit": {"transformer": 20.43, **QWEN_VL},
    "sd3.5-large": {
        "transformer": 8.06, "text_encoder": 0.124, "text_encoder_2": 0.695, "text_encoder_3": 4.76, "vae": 0.0838,
    },
    "sdxl": {"unet": 2.567, "text_encoder": 0.123, "text_encoder_2": 0.695, "vae": 0.0837},
    "wan2.1-14b": {"transformer": WAN, "text_encoder": UMT5, "vae": 0.127},
    "wan2.2-a14b": {"transformer": WAN, "transformer_2": WAN, "text_encoder": UMT5, "vae": 0.127},
    "z-image-turbo": {"transformer": 6.15, "text_encoder": 4.02, "vae": 0.0838},
}  # fmt: skip
"""Billions of parameters."""


@cache
def true_size(part: str) -> int | None:
    """Parameters of a component, given as JSON, built without memory."""
    module = build_part("", json.loads(part), META, torch.bfloat16)
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else None


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_published(name: str) -> None:
    architecture = read_architecture(f"random:{name}")
    found = {
        key: size
        for key, part in architecture.components.items()
        if "stand_in" not in part and (size := true_size(json.dumps(part, sort_keys=True)))
    }
    assert found == architecture.parameters
    assert found == {key: pytest.approx(size * 1e9, rel=0.01) for key, size in PUBLISHED[name].items()}


@cache
def tiny(name: str, dtype: str) -> Any:
    pipeline = load_pipeline(locate(f"tiny:{name}"), dtype=dtype, allow_pickle=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(name: str, prompt: str = PROMPT, seed: int = 0, dtype: str = "float32") -> Tensor:
    call = locate(f"tiny:{name}").defaults
    output = tiny(name, dtype)(
        prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", return_dict=False, **call
    )
    return output[0].float()


@pytest.mark.parametrize("name", NAMES)
def test_tiny_forms_paint(name: str) -> None:
    call = locate(f"tiny:{name}").defaults
    picture = paint(name)
    assert picture.shape == (
        1,
        *([call["num_frames"]] if "num_frames" in call else []),
        3,
        call["height"],
        call["width"],
    )
    assert picture.isfinite().all()
    assert picture.std() > 0.1
    assert torch.equal(paint(name), picture)
    assert (paint(name, "the blue dog") - picture).abs().max() > 0.01
    assert (paint(name, seed=1) - picture).abs().max() > 0.1
    in_bfloat16 = paint(name, dtype="bfloat16")
    assert in_bfloat16.isfinite().all()
    assert (in_bfloat16 - picture).abs().mean() < 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen-image-edit"])
def test_every_block_has_its_effect(name: str) -> None:
    pipeline, picture = tiny(name, "float32"), paint(name)
    for key in DENOISERS:
        for stack in _stacks(getattr(pipeline, key, None)):
            for block in stack:
                before = [p.clone() for p in block.parameters()]
                for p in block.parameters():
                    p.mul_(0.5)
                changed = paint(name)
                for p, values in zip(block.parameters(), before, strict=True):
                    p.copy_(values)
                assert (changed - picture).abs().max() > 0.01
    assert torch.equal(paint(name), picture)


def _stacks(model: nn.Module | None) -> Iterator[nn.ModuleList]:
    for child in model.children() if model is not None else ():
        if isinstance(child, nn.ModuleList):
            yield child


def part(name: str, key: str, dtype: torch.dtype) -> Any:
    return build_part(key, read_architecture(f"tiny:{name}").components[key], CPU, dtype)


LOADED = [
    ("flux.1-dev", "text_encoder"), ("flux.1-dev", "text_encoder_2"), ("flux.2-dev", "text_encoder"),
    ("flux.2-dev", "vae"), ("flux.2-klein-4b", "text_encoder"), ("qwen-image", "text_encoder"),
    ("qwen-image", "transformer"), ("sd3.5-large", "transformer"), ("sdxl", "unet"), ("wan2.1-14b", "transformer"),
    ("z-image-turbo", "transformer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "dtype"),
    [(*one, torch.bfloat16) for one in LOADED] + [(*one, torch.float16) for one in LOADED[1:2] + LOADED[-2:-1]],
)
def test_modules_are_as_from_pretrained_gives_them(name: str, key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    built = part(name, key, dtype)
    built.save_pretrained(tmp_path)
    loaded = type(built).from_pretrained(tmp_path, torch_dtype=dtype)
    assert (built.training, built.dtype) == (loaded.training, loaded.dtype)
    want = tensors(loaded)
    for tensor, value in tensors(built).items():
        assert value.dtype == want[tensor].dtype, tensor
        assert torch.equal(value, want[tensor]), tensor
    assert tensors(built).keys() == want.keys()
    assert not any(p.requires_grad for p in built.parameters())


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and tensors that are neither."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, child in module.named_modules():
        found |= {f"{path}.{key}": value for key, value in vars(child).items() if isinstance(value, Tensor)}
    return found


def test_weights_are_the_same_in_every_build() -> None:
    one, two = part("wan2.2-a14b", "transformer", torch.float32), part("wan2.2-a14b", "transformer", torch.float32)
    rounded, other = (
        part("wan2.2-a14b", "transformer", torch.bfloat16),
        part("wan2.2-a14b", "transformer_2", torch.float32),
    )
    for (key, a), b, c, d in zip(
        one.named_parameters(), two.parameters(), rounded.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a.to(c.dtype), c)
        assert not torch.equal(a, d), key


def test_what_is_drawn_in_pieces_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "CHUNK", 1000)
    module = part("flux.1-dev", "transformer", torch.float32)
    weight = module.transformer_blocks[0].ff.net[0].proj.weight
    assert weight.std().item() == pytest.approx(1 / weight.shape[1] ** 0.5, rel=0.05)
    assert len(weight.unique()) > 0.99 * weight.numel()


def test_tied_weights_stay_one() -> None:
    model = part("flux.2-klein-4b", "text_encoder", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(3)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    torch.set_default_device("meta")
    try:
        module = part("wan2.1-14b", "transformer", torch.bfloat16)
        assert torch.get_default_device() == META
    finally:
        torch.set_default_device(None)
    assert {tensor.device for tensor in tensors(module).values()} == {CPU}
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="unknown"):
        build_part("", {"library": "diffusers", "class": "AutoencoderKL", "config": {"unknown": 1}}, CPU, torch.float16)
    assert torch.get_default_dtype() == dtype


def text_of(name: str) -> tuple[Any, str, int]:
    """Tokenizer, what the pipeline puts before a prompt, and how many tokens it cuts off for it."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    pipeline = tiny(name, "float32")
    if name == "hunyuanvideo":
        return pipeline.tokenizer, DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    return pipeline.tokenizer, pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-edit", "hunyuanvideo"])
def test_the_words_before_a_prompt_are_as_many_tokens_as_the_pipeline_cuts_off(name: str) -> None:
    tokenizer, template, cut = text_of(name)
    before = template.partition("{}")[0].partition("<|vision_start|>")[0]
    assert len(tokenizer(before).input_ids) == cut
    text = template.format("ünï 你好")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_picture_to_edit_counts() -> None:
    call = locate("tiny:qwen-image-edit").defaults
    pipeline, picture = tiny("qwen-image-edit", "float32"), call["image"]
    given = dict(text=["<|image_pad|> and red"], images=[picture])
    tokens = pipeline.processor(**given)
    grid = tokens["image_grid_thw"][0]
    assert int((tokens["input_ids"] == 151655).sum()) == int(grid.prod()) // 4 > 1
    assert tokens["pixel_values"].shape[0] == int(grid.prod())
    with pytest.raises(ConfigError, match="image: 1 given for 2 prompts; give one for each"):
        pipeline.processor(**given | {"text": given["text"] * 2})
    call |= dict(prompt="red", output_type="pt")
    pictures = [
        pipeline(**call | dict(image=one, generator=torch.Generator().manual_seed(0))).images
        for one in (picture, picture.rotate(90))
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 0.1


TOKENS = {
    "flux.1-dev": ("tokenizer", [49406, 64, 49407, 49407], 77),
    "sdxl": ("tokenizer_2", [49406, 64, 49407, 0], 77),
    "sd3.5-large": ("tokenizer_3", [68, 1, 0, 0], 256),
    "wan2.1-14b": ("tokenizer", [68, 1, 0, 0], 512),
    "hunyuanvideo": ("tokenizer", [128000, 64, 128258, 128258], 351),
    "flux.2-klein-4b": ("tokenizer", [64, 151643, 151643, 151643], 512),
}


@pytest.mark.parametrize(("name", "key", "ids", "length"), [(name, *values) for name, values in TOKENS.items()])
def test_special_tokens_and_padding(name: str, key: str, ids: list[int], length: int) -> None:
    tokens = getattr(tiny(name, "float32"), key)("a", padding="max_length", max_length=length, truncation=True)
    assert tokens.input_ids[:4] == ids
    assert len(tokens.input_ids) == length


def test_a_source() -> None:
    source, small = locate("random:wan2.2-a14b"), locate("tiny:wan2.2-a14b")
    assert (source.kind, source.pipeline_class, source.size_multiple) == ("random", "WanPipeline", 16)
    assert source.components is not None
    assert {"transformer", "transformer_2"} <= {*source.components}
    assert source.defaults["num_frames"] == 81
    assert source.model_id == locate("random:wan2.2-a14b").model_id != small.model_id
    assert {locate(f"random:{name}").size_multiple for name in NAMES} == {8, 16}


def test_names_that_are_not_there() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'flux.1-dev'\? There are flux.1-dev, .*, z-image-turbo\.$"):
        locate("random:flux1-dev")
    with pytest.raises(ModelError, match=r"is no known architecture\. There are"):
        locate("tiny:")
    with pytest.raises(ModelError, match=r"does not exist; did you mean 'random:sd3.5-large'\?"):
        locate("sd3.5-large")


def test_a_part_of_ones_own() -> None:
    vae = part("flux.1-dev", "vae", torch.float32)
    with Engine.from_pretrained("tiny:flux.1-dev", vae=vae) as engine:
        assert engine.pipeline.vae is vae
        assert engine(PROMPT, seed=0, output_type="pt").images.isfinite().all()
    with pytest.raises(
        ConfigError, match=r"model='tiny:flux.1-dev': unknown key 'variant'; allowed: device_map, dtype, "
    ):
        Engine.from_pretrained("tiny:flux.1-dev", variant="fp16")


def test_dtypes_by_component() -> None:
    dtypes = {"vae": torch.float32, "default": torch.bfloat16}
    pipeline = load_pipeline(locate("tiny:flux.1-dev"), dtype=dtypes, allow_pickle=False)
    assert (pipeline.vae.dtype, pipeline.transformer.dtype) == (torch.float32, torch.bfloat16)
