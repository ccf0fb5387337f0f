"""A call is checked before anything runs; and what ranks compare follows its content, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from parafuse.engine.request import can_encode, check_call, check_keywords, facts, fresh_seed
from parafuse.engine.source import ModelSource
from parafuse.errors import ConfigError

DEFAULTS = {"width": 64, "num_inference_steps": 20, "negative_prompt": "blurry"}
SOURCE = ModelSource(name="m", path="/m", kind="folder", model_id="0", defaults=DEFAULTS, size_multiple=16)
PLAIN = ModelSource(name="m", path="/m", kind="hub", model_id="0")


def refusal(**keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_call(SOURCE, keywords)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_models_defaults_fill_in_what_is_not_given() -> None:
    given_keywords = {"prompt": "x", "width": 32, "num_inference_steps": None, "callback": print}
    out = check_call(SOURCE, given_keywords)
    assert out == DEFAULTS | {"prompt": "x", "width": 32, "callback": print}
    assert given_keywords["num_inference_steps"] is None
    assert SOURCE.defaults == {"width": 64, "num_inference_steps": 20, "negative_prompt": "blurry"}
    assert check_call(PLAIN, {"prompt": "x", "width": 33}) == {"prompt": "x", "width": 33}


def test_no_negative_prompt_is_a_thing_to_ask_for() -> None:
    assert check_call(SOURCE, {"prompt": "x", "negative_prompt": None})["negative_prompt"] is None
    assert check_call(SOURCE, {"prompt": "x", "negative_prompt": ""})["negative_prompt"] == ""


def test_as_many_negative_prompts_as_prompts() -> None:
    assert check_call(SOURCE, {"prompt": ["a", "b"], "negative_prompt": ["x", "y"]})["negative_prompt"] == ["x", "y"]
    with pytest.raises(ConfigError, match="negative_prompt: 1 given for 2 prompts; give one for each"):
        check_call(SOURCE, {"prompt": ["a", "b"], "negative_prompt": ["x"]})


def test_what_is_given_for_each_picture_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"negative_prompt\[1\]=None: must be a text"):
        check_call(SOURCE, {"prompt": ["a", "b"], "negative_prompt": ["x", None]})
    with pytest.raises(ConfigError, match="generator: 1 given for 2 pictures; give one for each, or one for all"):
        check_call(SOURCE, {"prompt": ["a", "b"], "generator": [object()]})
    two = {"prompt": "a", "num_images_per_prompt": 2, "generator": [object()] * 2}
    assert check_call(SOURCE, two)["generator"] == two["generator"]


def test_another_kind_of_negative_prompt_takes_the_place_of_the_default() -> None:
    assert "negative_prompt" not in check_call(SOURCE, {"prompt": "x", "negative_prompt_embeds": [1]})


def test_a_default_negative_prompt_is_repeated_for_several_prompts() -> None:
    assert check_call(SOURCE, {"prompt": ["a", "b"]})["negative_prompt"] == ["blurry", "blurry"]
    assert check_call(SOURCE, {"prompt": "a"})["negative_prompt"] == "blurry"
    assert check_call(SOURCE, {"prompt": ["a", "b"], "negative_prompt": "no"})["negative_prompt"] == "no"


@given(st.text(max_size=300))
def test_a_prompt_may_be_any_text(prompt: str) -> None:
    assert check_call(SOURCE, {"prompt": prompt})["prompt"] == prompt
    assert check_call(SOURCE, {"prompt": [prompt, ""]})["prompt"] == [prompt, ""]


@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "ένα κόκκινο μήλο", "一个红苹果", "تفاحة حمراء", "🍎" * 500])
def test_prompts_that_others_stumble_over(prompt: str) -> None:
    out = check_call(SOURCE, {"prompt": prompt})
    assert out["prompt"] == prompt
    assert facts(out) != facts(check_call(SOURCE, {"prompt": prompt + "."}))


@pytest.mark.parametrize("prompt", [5, b"x", ("a",), {"a": 1}])
def test_a_prompt_of_another_kind(prompt: Any) -> None:
    assert refusal(prompt=prompt) == f"prompt={prompt!r}: must be a text or a list of texts."


def test_a_prompt_in_a_list_of_another_kind() -> None:
    assert refusal(prompt=["a", 5]) == "prompt[1]=5: must be a text."
    assert refusal(prompt=["a", None]) == "prompt[1]=None: must be a text."


@pytest.mark.parametrize(
    "name", ["num_inference_steps", "num_images_per_prompt", "num_videos_per_prompt", "num_frames"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_counts_are_at_least_one(name: str, value: Any) -> None:
    assert refusal(**{name: value}) == f"{name}={value!r}: must be a whole number of at least 1."
    assert check_call(SOURCE, {name: 1})[name] == 1


@pytest.mark.parametrize("name", ["width", "height"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (100, "100: must be a multiple of 16 for this model's VAE and patches; use 96 or 112."),
        (7, "7: must be a multiple of 16 for this model's VAE and patches; use 16."),
        (0, "0: must be a whole number of pixels, at least 1."),
        (-16, "-16: must be a whole number of pixels, at least 1."),
        (64.0, "64.0: must be a whole number of pixels, at least 1."),
        ("64", "'64': must be a whole number of pixels, at least 1."),
        (True, "True: must be a whole number of pixels, at least 1."),
    ],
)
def test_sizes_that_the_vae_cannot_do(name: str, value: Any, found: str) -> None:
    assert refusal(**{name: value}) == f"{name}={found}"


@given(st.integers(1, 4000), st.integers(1, 64))
def test_sizes_pass_exactly_when_they_divide(size: int, multiple: int) -> None:
    source = ModelSource(name="m", path="/m", kind="folder", model_id="0", size_multiple=multiple)
    try:
        check_call(source, {"width": size})
    except ConfigError:
        assert size % multiple
    else:
        assert size % multiple == 0


@pytest.mark.parametrize("name", ["guidance_scale", "true_cfg_scale"])
def test_scales_are_numbers(name: str) -> None:
    assert check_call(SOURCE, {name: 0})[name] == 0
    assert refusal(**{name: "3"}) == f"{name}='3': must be a finite number."
    assert refusal(**{name: True}) == f"{name}=True: must be a finite number."


def test_unknown_keywords_name_the_nearest() -> None:
    check_keywords(["prompt"], ["prompt", "height"], "FluxPipeline")
    with pytest.raises(ConfigError, match=r"call of FluxPipeline: unknown key 'hieght'; did you mean 'height'\?"):
        check_keywords(["prompt", "hieght"], ["prompt", "height"], "FluxPipeline")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_guidance_is_finite(value: float) -> None:
    assert "must be a finite number" in refusal(guidance_scale=value)


def test_facts_have_names_and_long_ones_a_hash() -> None:
    found = facts({"seed": 1, "nested": {"a": [1, 2]}, "": {"prompts": ["x" * 100]}, "t": torch.zeros(2)})
    assert found["seed"] == "1"
    assert found["nested.a"] == "[1, 2]"
    assert found["prompts"].startswith('["xxx')
    assert len(found["prompts"]) < 100
    assert found["t"] != facts({"t": torch.ones(2)})["t"]
    assert found["prompts"] != facts({"prompts": ["x" * 99 + "y"]})["prompts"]


def test_seeds_differ_and_fit() -> None:
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**31 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def variations() -> dict[str, Any]:
    """Values that are all different."""
    base, red = torch.arange(12.0), Image.new("RGB", (4, 4), "red")
    return {
        "none": None,
        "text": "a",
        "number": 1,
        "another number": 2,
        "float": 1.5,
        "list": [1, 2],
        "order": [2, 1],
        "nested": {"a": [1, {"b": 2}]},
        "nested otherwise": {"a": [1, {"b": 3}]},
        "tensor": base,
        "shape": base.view(3, 4),
        "dtype": base.double(),
        "bfloat16": base.bfloat16(),
        "values": base + 1,
        "slice": base[1:5],
        "another slice": base[2:6],
        "bool": base > 3,
        "empty": base[:0],
        "generator": torch.Generator().manual_seed(1),
        "another generator": torch.Generator().manual_seed(2),
        "picture": red,
        "another picture": Image.new("RGB", (4, 4), "blue"),
        "array": base.numpy(),
        "array's shape": base.numpy().reshape(3, 4),
        "array's other shape": base.numpy().reshape(4, 3),
        "array's dtype": base.numpy().view("int32"),
        "picture's shape": Image.frombytes("RGB", (2, 8), red.tobytes()),
        "picture's mode": Image.frombytes("L", (12, 4), red.tobytes()),
        "palette": colours(0),
        "another palette": colours(1),
        "bytes": b"a",
        "other bytes": b"b",
    }


def colours(first: int) -> Image.Image:
    """A picture whose bytes are all 0, of the colour that its palette says."""
    image = Image.new("P", (4, 4))
    image.putpalette([first, 0, 0])
    return image


def test_what_differs_has_other_facts() -> None:
    found = {str(facts({"x": value})) for value in variations().values()}
    assert len(found) == len(variations())


def test_what_is_equal_has_the_same_facts() -> None:
    again = variations()
    assert {name: facts(value) for name, value in variations().items()} == {n: facts(v) for n, v in again.items()}
    assert facts({"a": 1, "b": 2}) == facts({"b": 2, "a": 1})
    assert facts((1, 2)) == facts([1, 2])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
)
def test_tensors_by_content_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    """Ranks may hold the same values as a slice, a transpose, or a tensor of its own."""
    whole = (torch.arange(24).view(4, 6) % 7).to(dtype)
    for view in (whole[1:3], whole.t(), whole[:, ::2], whole[0, 0], whole[:0]):
        assert facts(view) == facts(view.clone())
        assert facts(view) == facts(torch.empty_strided(view.shape, view.stride(), dtype=dtype).copy_(view))


def test_a_list_of_no_prompts() -> None:
    assert refusal(prompt=[]) == "prompt=[]: is empty; give at least one text."


def test_without_text_encoders_no_text_is_read() -> None:
    """The model's own texts stay out, and a prompt is refused; embeddings are what is left."""
    embeds = {"prompt_embeds": torch.zeros(1, 2, 3)}
    out = check_call(SOURCE, embeds, encodes=False)
    assert out == {"width": 64, "num_inference_steps": 20} | embeds
    assert check_call(SOURCE, embeds)["negative_prompt"] == "blurry", "control: where text can be read"
    with pytest.raises(ConfigError, match="prompt: given, but the pipeline was loaded without its text encoders; give"):
        check_call(SOURCE, {"prompt": "x"}, encodes=False)


def test_whether_a_pipeline_can_read_text() -> None:
    class Two:
        def __init__(self, text_encoder: Any, text_encoder_2: Any, vae: Any = None):
            self.text_encoder, self.text_encoder_2, self.vae = text_encoder, text_encoder_2, vae

    class Unconditional:
        def __init__(self, unet: Any):
            self.unet = unet

    assert can_encode(Two(None, 1))
    assert can_encode(Unconditional(None))
    assert not can_encode(Two(None, None, 1))
