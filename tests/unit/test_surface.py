"""Members of the pipeline on an engine of one rank, and the rules for several without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import parafuse
from parafuse.config import Axis
from parafuse.engine.devices import refuse_another_device, refuse_numbered
from parafuse.engine.members import Way, refusal, way_of
from parafuse.engine.plan import Plan
from parafuse.engine.state import PipelineState
from parafuse.engine.surface import Act
from parafuse.engine.workers import PIECE_BYTES, get, put, take_away
from parafuse.errors import ConfigError, ModelError
from tests.adapters import lora
from tests.drop_in.pipelines import BUILDERS
from tests.drop_in.rows import plain as pipeline_of
from tests.drop_in.script import picture

FLUX = "FluxPipeline"


def plan_of(**degrees: int) -> Plan:
    whole = {str(axis): degrees.get(axis, 1) for axis in Axis}
    size = torch.tensor(list(whole.values())).prod().item()
    return Plan(
        model="m", model_id="i", world_size=int(size), degrees=whole, device="cuda", dtype="float32", timeout_s=60.0
    )


@pytest.fixture
def engine() -> parafuse.Engine:
    return parafuse.Engine.from_pipeline(pipeline_of(FLUX), alone=True)


def test_a_member_that_is_not_there_is_an_error(engine: parafuse.Engine) -> None:
    with pytest.raises(AttributeError, match="FluxPipeline has no 'enable_freeu'"):
        engine.enable_freeu()
    with pytest.raises(AttributeError, match="did you mean 'scheduler'"):
        engine.schedular = None
    assert "load_lora_weights" in dir(engine)
    assert not hasattr(engine, "nothing")


def test_the_vaes_switches_are_the_pipelines(engine: parafuse.Engine) -> None:
    """diffusers has moved them from the pipelines to the VAE."""
    assert not hasattr(engine.pipeline, "enable_vae_tiling")
    for name in ("slicing", "tiling"):
        getattr(engine, f"enable_vae_{name}")()
        assert getattr(engine.vae, f"use_{name}")
        getattr(engine, f"disable_vae_{name}")()
        assert not getattr(engine.vae, f"use_{name}")
    engine.vae = None
    with pytest.raises(AttributeError, match="FluxPipeline has no vae with enable_tiling"):
        engine.enable_vae_tiling()


def test_it_is_a_pipeline_that_is_moved(engine: parafuse.Engine) -> None:
    assert engine.to(torch.bfloat16) is engine
    assert (engine.plan.dtype, engine.dtype) == ("bfloat16", torch.bfloat16)
    assert engine.to("cpu", torch.float32) is engine
    assert engine.plan.dtype == "float32"


def test_a_closed_engine_does_nothing_more(engine: parafuse.Engine) -> None:
    engine.close()
    with pytest.raises(ConfigError, match="it is closed"):
        engine.set_attention_slice(1)


def test_ways() -> None:
    assert way_of("save_pretrained") is Way.WRITES
    assert way_of("components_of_tomorrow") is Way.EVERYWHERE
    assert way_of("numpy_to_pil") is Way.HERE
    assert refusal("enable_xformers_memory_efficient_attention", plan_of(cfg=2)) is None
    assert "over 4 ranks of a sequence" in str(
        refusal("enable_xformers_memory_efficient_attention", plan_of(ring=2, ulysses=2))
    )
    assert refusal("set_use_memory_efficient_attention_xformers", plan_of(ulysses=2), (False,)) is None


@pytest.mark.parametrize(
    "values", [{"device": "cuda:1"}, {"argument 1": torch.device("cuda", 0)}, {"gpu_id": 0}], ids=str
)
def test_a_numbered_device_would_be_one_for_all_ranks(values: dict[str, Any]) -> None:
    refuse_numbered("to", {"device": "cuda", "argument 1": torch.device("cuda"), "word": "cuda"})
    with pytest.raises(ConfigError, match="every rank has a device of its own"):
        refuse_numbered("to", values)


def test_another_device_is_for_one_rank() -> None:
    refuse_another_device([torch.device("cpu")], plan_of(), 1)
    refuse_another_device([torch.device("cuda")], plan_of(cfg=2), 2)
    with pytest.raises(ConfigError, match="are on 'cuda'"):
        refuse_another_device([torch.device("cpu")], plan_of(cfg=2), 2)


def test_parts_as_arguments_are_taken_by_each_rank_from_its_own_pipeline() -> None:
    one, other = pipeline_of(FLUX), pipeline_of(FLUX)
    act = Act(name="register_modules", kwargs={"transformer": one.transformer, "vae": None}).referring(one)
    act.do(other)
    assert other.transformer is not one.transformer
    assert other.vae is None


def test_the_state_of_a_pipeline_tells_what_changed() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    one, other = pipeline_of(FLUX), BUILDERS[FLUX]()
    state = PipelineState(one)
    assert state.facts() == PipelineState(other).facts()
    before = state.facts()

    def changed() -> set[str]:
        after = state.facts()
        return {name for name in before if after.get(name) != before[name]}

    one.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert changed() == {"scheduler"}
    one.load_lora_weights(lora(one, ["transformer"], rank=2, seed=1, every=9), adapter_name="a")
    one.vae.to(torch.bfloat16)
    assert changed() == {"scheduler", "transformer", "vae"}
    before = state.facts()
    one.set_adapters(["a"], [0.5])
    assert changed() == {"transformer"}
    before = state.facts()
    one.tokenizer.add_tokens("<thing>")
    assert changed() == {"tokenizer"}


def test_text_of_any_length_goes_through_a_store() -> None:
    store = dist.HashStore()
    for text in ("", "short", "x" * (2 * PIECE_BYTES) + "y"):
        put(store, "request/1", text)
        assert get(store, "request/1") == text
        take_away(store, "request/1")
        assert not store.check(["request/1"])
        assert not store.check(["request/1/0"])
    take_away(store, "request/0")  # that never was


def test_a_saved_engine_is_a_folder_of_diffusers_and_more(engine: parafuse.Engine, tmp_path: Path) -> None:
    want = picture(engine)
    engine.save(tmp_path)
    again = parafuse.Engine.load(tmp_path)
    assert again.plan.model == str(tmp_path)
    assert again.loaded["plan"] == "used"
    assert torch.equal(picture(again), want)
    other = parafuse.Engine.load(tmp_path, parafuse.Config(dtype="bfloat16"))
    assert other.loaded["plan"] == "not used: another config is given"
    assert other.dtype == torch.bfloat16
    assert torch.equal(picture(type(engine.pipeline).from_pretrained(tmp_path)), want)


def test_a_saved_plan_that_does_not_fit_is_not_used(engine: parafuse.Engine, tmp_path: Path) -> None:
    engine.save(tmp_path)
    file = tmp_path / "parafuse" / "engine.json"
    record = json.loads(file.read_text())
    saved = record["plan"]
    record["plan"] = saved | {"device": "cuda", "world_size": 8, "degrees": saved["degrees"] | {"ulysses": 8}}
    file.write_text(json.dumps(record))
    assert parafuse.Engine.load(tmp_path).loaded["plan"] == "not used: it is for 8 CUDA devices, here are 0"
    (tmp_path / "parafuse" / "compiled").write_bytes(b"anything")
    assert "made with device 'cpu', here is 'cuda'" in parafuse.Engine.load(tmp_path).loaded["compiled"]
    record["plan"] = saved
    file.write_text(json.dumps(record))
    assert "Config(allow_pickle=True) if you trust" in parafuse.Engine.load(tmp_path).loaded["compiled"]
    again = parafuse.Engine.load(tmp_path, parafuse.Config(allow_pickle=True))
    assert again.loaded["plan"] == "used"
    assert again.loaded["compiled"] == "not used: torch finds nothing in it"
    record["machine"]["torch"] = "1.0"
    file.write_text(json.dumps(record))
    found = parafuse.Engine.load(tmp_path).loaded
    assert found["compiled"].startswith("not used: made with torch '1.0', here is")
    file.write_text(json.dumps(record | {"schema": 99}))
    with pytest.raises(ModelError, match="schema 99; this version reads 1"):
        parafuse.Engine.load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"has no parafuse/engine\.json, so no engine was saved there"):
        parafuse.Engine.load(tmp_path)


def test_what_a_folder_does_not_hold_is_not_saved_without_a_word(engine: parafuse.Engine, tmp_path: Path) -> None:
    engine.load_lora_weights(lora(engine.pipeline, ["transformer"], rank=2, seed=1, every=9), adapter_name="a")
    with pytest.raises(ConfigError, match=r"transformer has adapters \(a\).* fuse_lora\(\) and then"):
        engine.save(tmp_path)
    engine.unload_lora_weights()
    engine.transformer.fuse_qkv_projections()
    with pytest.raises(ConfigError, match=r"transformer has weights that its configuration does not make"):
        engine.save(tmp_path)
    assert not list(tmp_path.iterdir())
