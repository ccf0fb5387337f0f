"""A quantization that cannot be had is refused before weights are loaded, in one line that says the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import parafuse
from parafuse import Config, Plan, hardware
from parafuse.engine.quantize.saved import RECORD, check_saved, saved_by
from parafuse.engine.quantize.settle import capability_here, settled
from parafuse.engine.source import ModelSource
from parafuse.errors import ConfigError
from parafuse.hardware import Gpu
from parafuse.quantization import METHODS, Fp8, Int8, Quantize, quantize_of
from tests.unit.test_config_plan import make_plan

HOPPER, ADA, AMPERE, TURING, THOR = (9, 0), (8, 9), (8, 6), (7, 5), (11, 0)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("fp8", Fp8()),
        ("fp8:scale=row,min_features=512", Fp8(scale="row", min_features=512)),
        ("fp8:reference=true", Fp8(reference=True)),
        ("int8:text_encoders=int8-weight", Int8(text_encoders="int8-weight")),
        ("int8:skip=transformer.a.0.b+transformer.a.*.c", Int8(skip="transformer.a.0.b+transformer.a.*.c")),
    ],
)
def test_a_text_makes_a_quantization_and_that_its_text(text: str, method: Quantize) -> None:
    assert quantize_of(text) == method == quantize_of(str(method)) == quantize_of(method.brief)
    assert Config(quantize=text) == Config(quantize=method) == Config.from_dict(Config(quantize=text).to_dict())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fp9", "'fp9' is no quantize; there are fp8, fp8-weight, int8, int8-weight; did you mean 'fp8'?"),
        ("fp8:scale=rows", "scale='rows': must be one of auto, row, tensor, calibrated; did you mean 'row'?"),
        ("fp8:reference=maybe", "reference='maybe': must be true or false"),
        ("int8:reference=true", "unknown key 'reference'"),
        ("int8:min_features=0", "min_features=0: must be a whole number of at least 1"),
        ("int8:text_encoders=fp9", "text_encoders='fp9': must be one of none, fp8"),
        (8, "must be a text such as 'fp8', a parafuse.Fp8 or another method, or None"),
    ],
)
def test_a_wrong_text_is_refused_in_one_line(value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(quantize=value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def on(method: str, capability: tuple[int, int] | None, ranks: int = 1, dtype: str = "bfloat16") -> str:
    """What is settled, or why not."""
    found = quantize_of(method)
    assert found is not None
    device = "cpu" if capability is None else "cuda"
    try:
        done = settled(found, device=device, capability=capability, dtype=dtype, world_size=ranks)
    except ConfigError as error:
        return str(error)
    return getattr(done, "scale", "")


@pytest.mark.parametrize(
    ("method", "capability", "ranks", "words"),
    [
        ("fp8", HOPPER, 8, "row"),
        ("fp8", ADA, 2, "row"),
        ("fp8", THOR, 1, "tensor"),
        ("fp8", THOR, 2, "scale=tensor: each of 2 ranks would take the largest value of its own part"),
        ("fp8:scale=row", THOR, 1, "compute capability 11.0 has no fp8 products with a scale for each row"),
        ("fp8", AMPERE, 1, "needs CUDA compute capability 8.9 or later, this machine's is 8.6; use int8"),
        ("fp8-weight", AMPERE, 1, ""),
        ("int8", AMPERE, 1, ""),
        ("int8", TURING, 1, "needs CUDA compute capability 8.0 or later, this machine's is 7.5; use int8-weight"),
        ("int8-weight", TURING, 1, ""),
        ("fp8", None, 1, "a CPU has no fp8 matrix products (GPUs of compute capability 8.9 and later have"),
        ("fp8:reference=true", None, 2, "row"),
        ("fp8:reference=true", HOPPER, 1, "reference=true: is for a CPU"),
        ("fp8:scale=tensor", HOPPER, 1, "tensor"),
        ("fp8:scale=tensor", HOPPER, 2, "another picture would come of it; use scale=row, or scale=calibrated"),
        ("fp8:scale=calibrated", HOPPER, 2, "must be measured; parafuse quantize"),
        ("int8:text_encoders=fp8", AMPERE, 1, "text_encoders=fp8: quantize fp8: needs CUDA compute capability 8.9"),
    ],
)
def test_what_a_device_can(method: str, capability: tuple[int, int] | None, ranks: int, words: str) -> None:
    found = on(method, capability, ranks)
    assert found.startswith(words) if words in ("row", "tensor", "") else words in found
    assert words or not found


def test_fp8_products_give_bfloat16() -> None:
    assert "dtype='float16': fp8 products give bfloat16" in on("fp8", HOPPER, dtype="float16")
    assert on("fp8:reference=true", None, dtype="float32") == "row"


def test_int8_is_not_for_float16() -> None:
    assert "dtype='float16': products are added up before they are scaled" in on("int8-weight", None, dtype="float16")


def test_only_visible_gpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Gpu(name=name, memory_bytes=1, capability=name, nvlinks=0) for name in ("9.0", "6.1")]
    monkeypatch.setattr(hardware, "gpus", lambda: ("1", found))
    for visible, least in (("0", (9, 0)), ("1", (6, 1)), ("0,1", (6, 1)), ("GPU-x", (6, 1))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert capability_here() == least


def test_a_plan_holds_it_settled() -> None:
    with pytest.raises(ConfigError, match=r"plan\.quantize: scale=auto: a plan is explicit"):
        make_plan(quantize="fp8")
    with pytest.raises(ConfigError, match="a CPU has no fp8"):
        parafuse.Engine.from_pretrained("emoji", Config(quantize="fp8", device="cpu"))
    plan = make_plan(quantize="fp8:scale=row")
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.config().quantize == Fp8(scale="row")
    assert not make_plan(quantize="int8").changes_nothing
    assert "quantize fp8:scale=row" in plan.one_line()


def folder(path: Path, **configs: dict[str, Any]) -> ModelSource:
    for part, facts in configs.items():
        (path / part).mkdir()
        (path / part / "config.json").write_text(json.dumps({"quantization_config": facts}))
    return ModelSource(name="m", path=str(path), kind="folder", model_id="x", components=tuple(configs))


def torchao(kind: str, granularity: str = "PerRow") -> dict[str, Any]:
    data = {"granularity": [{"_type": granularity}]}
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": data}}}


def test_a_folder_says_what_it_is_quantized_with(tmp_path: Path) -> None:
    fp8 = "Float8DynamicActivationFloat8WeightConfig"
    source = folder(
        tmp_path,
        a=torchao(fp8),
        b=torchao(fp8, "PerTensor"),
        c=torchao("Int8WeightOnlyConfig"),
        d=torchao("Int4WeightOnlyConfig"),
        e={"quant_method": "gguf"},
        f=torchao(fp8, "PerTensor"),
    )
    (tmp_path / RECORD).parent.mkdir()
    (tmp_path / RECORD).write_text(json.dumps({"f": "fp8:scale=calibrated"}))
    found = {part: method.brief for part, method in saved_by(source).items()}
    assert found == {"a": "fp8:scale=row", "b": "fp8:scale=tensor", "c": "int8-weight", "f": "fp8:scale=calibrated"}


@pytest.mark.parametrize(
    ("kind", "granularity", "plan", "capability", "words"),
    [
        ("fp8", "PerRow", dict(device="cpu"), None, "is saved in fp8: a CPU has no fp8"),
        ("fp8", "PerRow", dict(device="cpu", quantize="fp8:reference=true,scale=row"), None, ""),
        ("fp8", "PerRow", dict(device="cuda", dtype="bfloat16"), AMPERE, "needs CUDA compute capability 8.9"),
        ("fp8", "PerRow", dict(device="cuda", dtype="bfloat16"), HOPPER, ""),
        ("fp8", "PerRow", dict(device="cuda", dtype="float16"), HOPPER, "fp8 products give bfloat16"),
        ("fp8", "PerTensor", dict(device="cuda", dtype="bfloat16"), HOPPER, "each of 6 ranks would take"),
        ("fp8", "PerRow", dict(device="cpu", quantize="int8"), None, "is saved in fp8:scale=row, and stays so"),
    ],
)
def test_a_saved_one_is_checked_before_it_is_loaded(
    tmp_path: Path, kind: str, granularity: str, plan: Any, capability: Any, words: str
) -> None:
    assert kind in METHODS
    source = folder(tmp_path, transformer=torchao("Float8DynamicActivationFloat8WeightConfig", granularity))
    if words:
        with pytest.raises(ConfigError, match=words):
            check_saved(source, make_plan(**plan), {}, capability)
    else:
        check_saved(source, make_plan(**plan), {}, capability)
