"""`Config()` on several ranks, and `parafuse plan`, as a user meets them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import parafuse
from parafuse.config import Axis, Config, Parallel
from parafuse.engine.engine import Engine
from parafuse.engine.memory.check import saved_in
from parafuse.engine.planning import choose as choosing
from parafuse.engine.planning import known, learned
from parafuse.engine.planning.choose import choose, facts_of, machine_at_hand
from parafuse.engine.planning.cost import Candidate, Costs
from parafuse.engine.source import ModelSource, locate
from parafuse.errors import ConfigError, ModelError
from parafuse.hardware import Gpu
from parafuse.launch import cli
from tests.dist.ranks import run_ranks
from tests.planning.models import denoiser, guided, machine

CPU = ("cpu", "float32")


def plan(*words: str) -> int:
    return cli.run(cli.Launch(["plan", *words], supervised=False))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Facts that are made once for all tests of a file would need a folder that they share; here each has its own."""
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch) -> None:
    """Facts worked out by hand in place of those of emoji."""
    monkeypatch.setattr(choosing, "facts_of", lambda *_, **__: guided())


def test_a_config_that_names_degrees_is_left_alone() -> None:
    for parallel in (Parallel(ulysses=2), Parallel(cfg=2), Parallel(ring=2, ulysses=1)):
        config = Config(parallel=parallel)
        assert not parallel.is_chosen
        assert choose(config, locate("emoji"), 2, CPU).config is config
    assert choose(Config(), locate("emoji"), 1, CPU).config == Config()


def test_nothing_set_is_chosen_and_said(quick: None) -> None:
    found = choose(Config(), locate("emoji"), 2, CPU)
    assert found.config.parallel == Parallel(cfg=2, ulysses=1)
    assert "chosen by cost of 3 plans" in found.why
    assert found.layout == "cfg 2"


def test_an_axis_may_be_left_to_be_chosen(quick: None) -> None:
    found = choose(Config(parallel=Parallel(ring="auto")), locate("emoji"), 2, CPU).config.parallel
    assert (found.data, found.cfg) == (1, 1)  # as they are given
    assert found.degrees(2)[Axis.RING] * found.degrees(2)[Axis.ULYSSES] == 2
    assert Parallel(cfg="auto").is_chosen
    with pytest.raises(ConfigError, match=r"parallel\.pipe='auto'"):
        Parallel(pipe="auto")  # pyright: ignore[reportArgumentType]


def test_options_of_the_config_stay(quick: None) -> None:
    found = choose(Config(cache="first-block:0.1", compile=True), locate("emoji"), 2, CPU)
    assert found.found is not None
    assert {(cost.candidate.compile, bool(cost.candidate.cache)) for cost in found.found.costs} == {(True, True)}


def test_without_facts_ulysses_takes_all_ranks(monkeypatch) -> None:
    def none(*_: object, **__: object):
        raise ModelError("model='x': is not in the local cache")

    monkeypatch.setattr(choosing, "facts_of", none)
    found = choose(Config(), locate("emoji"), 2, CPU)
    assert found.config == Config()
    assert "is not in the local cache" in found.why


def test_no_legal_layout_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(choosing, "facts_of", lambda *_, **__: guided(pictures=1))
    monkeypatch.setattr(choosing, "machine_at_hand", lambda *_: machine(7))
    assert choose(Config(), locate("emoji"), 7, CPU).config.parallel.ulysses == 7
    unet = guided(pictures=1, parts=(denoiser(refused="it has no block stack"),))
    monkeypatch.setattr(choosing, "facts_of", lambda *_, **__: unet)
    with pytest.raises(ConfigError, match="no plan of 7 ranks is legal"):
        choose(Config(), locate("emoji"), 7, CPU)


def test_the_machine_at_hand_is_the_measured_one(folder: Path) -> None:
    assert machine_at_hand(2, *CPU).name == "2xcpu"
    known.keep_machine(machine(2), 2, *CPU)
    assert machine_at_hand(2, *CPU) == machine(2)


def test_facts_are_kept_by_what_decides_them(folder: Path, monkeypatch) -> None:
    source = locate("tiny:sdxl")
    first = facts_of(source, Config(), CPU, {"num_inference_steps": 2})
    monkeypatch.setattr("parafuse.engine.planning.gather.gather", None)  # not made again
    assert facts_of(source, Config(), CPU, {"num_inference_steps": 2}) == first
    with pytest.raises(TypeError):
        facts_of(source, Config(), CPU, {"num_inference_steps": 3})


def _on_two_ranks() -> tuple[dict[str, int], str, dict[str, int]]:
    call = {"width": 64, "height": 64, "num_inference_steps": 2}
    with Engine.from_pretrained("emoji", Config(device="cpu"), expect=call) as engine:
        engine("a red apple", seed=1, output_type="np", **call)
        first = engine.plan
        pipeline = engine.pipeline
    handle = parafuse.apply(pipeline)  # the same for a pipeline that is loaded
    found = dict(handle.mesh.groups) if handle.mesh else {}
    handle.remove()
    return first.degrees, first.why, {str(axis): group.size() for axis, group in found.items()}


def test_all_ranks_choose_the_same() -> None:
    (degrees, why, applied), second = run_ranks(_on_two_ranks, 2)
    assert second == (degrees, why, applied)
    assert degrees["cfg"] == 2  # emoji has guidance
    assert "chosen by cost" in why
    assert list(applied.values()) == [2]  # a call without guidance, as the pipeline's own is
    assert applied.keys() <= {"ring", "ulysses"}


def _unet() -> dict[str, int]:
    with Engine.from_pretrained("tiny:sdxl", Config(device="cpu")) as engine:
        engine("a red apple", seed=1, num_inference_steps=1, output_type="latent")
        return engine.plan.degrees


def test_a_unet_gets_what_it_can_have() -> None:
    """Ulysses, which all ranks had without a planner, it has not."""
    first, second = run_ranks(_unet, 2)
    assert first == second
    assert first["cfg"] == 2


def test_the_command_shows_plans_for_a_named_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = folder / "scaling.svg"
    words = ("--model", "tiny:flux.1-dev", "--hardware", "8xh200", "--size", "128x64", "--plot", str(plot))
    assert plan(*words) == 0
    said = capsys.readouterr()
    assert "8 ranks: " in said.out
    assert "128x64" in said.out
    assert "best: " in said.out
    assert plot.read_text().startswith("<?xml")
    assert plan(*words[:6], "--json", "--objective", "throughput", "--fidelity", "fast") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choice"]["objective"] == "throughput"
    assert found["choice"]["plans"][0]["degrees"].items() <= found["plan"]["degrees"].items()
    assert found["choice"]["plans"][0]["degrees"]["data"] == 8
    again = parafuse.engine.plan.Plan.from_dict(found["plan"])
    assert again.world_size == 8


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("emojy", "--hardware", "8xh200"), "did you mean 'emoji'"),
        (("emoji", "--hardware", "8xh20o"), "did you mean 'h20"),
        (("emoji", "--ranks", "8", "--data", "8"), "parallel.data=8 (--data): the request has 1 picture"),
        (("tiny:flux.1-dev", "--ranks", "2", "--cfg", "2"), "parallel.cfg=2 (--cfg): the request has no guidance"),
        (("emoji", "--objective", "speed"), "must be one of latency, throughput, memory"),
        (("emoji", "--fidelity", "hihg"), "did you mean 'high'"),
        (("emoji", "--size", "1024"), "WIDTHxHEIGHT"),
        (("emoji", "--size", "64x64", "--width", "64"), "leave one out"),
        (("emoji", "--cache", "first-block:0.1"), "'exact', the default: not with cache='first-block:0.1'"),
        (
            ("emoji", "--cache", "first-block:0.1"),
            "exact allows lossless options alone, high also int8 and int8-weight",
        ),
        (("emoji", "--hardware", ""), "hardware='': must be NUMBERxDEVICE"),
        (("emoji", "--hardware", "2xh200", "--ranks", "4"), "has 2"),
        (("emoji", "--hardware", "2xh200", "--device", "cpu"), "computes on cuda"),
        (("emoji", "--hardware", "2xh200", "--probe"), "leave one out"),
        (("emoji", "--plot", "x.pdf"), "must end in .svg or .png"),
        (("emoji", "--requests", "0"), "at least 1"),
        (("emoji", "--model", "tiny:sdxl"), "leave one out"),
        (("tiny:sdxl", "--hardware", "7xh200"), "no plan of 7 ranks is legal"),
    ],
)
def test_a_wrong_request_is_one_line(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*words) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not found.out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": 3}, "model=3: must be str, not int"),
        ({"hardware": 2.5}, "hardware=2.5: must be a name such as '8xh200', a number of ranks"),
        ({"hardware": True}, "hardware=True"),
        ({"hardware": 0}, "hardware=0"),
        ({"call": [1]}, "call=.*must be Mapping or None, not list"),
        ({"config": {"compile": True}}, "config=.*must be Config or None, not dict"),
        ({"requests": 0}, "requests=0: must be at least 1"),
        ({"hardware": "8xh200", "config": Config(device="cpu")}, "computes on cuda, not on device='cpu'"),
    ],
)
def test_plans_refuse_what_they_do_not_take(asked: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parafuse.plans(**{"model": "emoji"} | asked)  # pyright: ignore[reportArgumentType]


def test_plans_of_this_machine(quick: None) -> None:
    assert parafuse.plans("emoji", config=Config(device="cpu")).machine.name == "1xcpu"
    found = parafuse.plans("emoji", 2, config=Config(device="cpu"))
    assert found.machine.name == "2xcpu"
    assert str(found).startswith("small, 1024x1024, 10 steps, 2 branches, bfloat16 on 2xcpu\n")


def test_headlines_have_options_in_brief(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--hardware", "1xh200", "--fidelity", "fast", "--cache", "first-block:0.1", "--quantize", "fp8-weight")
    assert plan("emoji", *words) == 0
    said = capsys.readouterr().out
    assert ", cache first-block:0.1, quantize fp8-weight" in said.splitlines()[0]
    assert "1 rank, quantize fp8-weight, cache first-block:0.1" in said
    assert "warmup" not in said


def test_a_dtype_that_is_not_the_models_own_is_said(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    own = saved_in(locate("emoji"))
    other = "float16" if own != "float16" else "bfloat16"
    for dtype, said in ((own, False), (other, True)):
        assert plan("emoji", "--hardware", "1xh200", "--dtype", dtype) == 0
        assert (f"the model is saved in {own}" in capsys.readouterr().err) == said


def test_a_plot_is_refused_before_the_work(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *on: None if name == "matplotlib" else real(name, *on)
    )
    monkeypatch.setattr(choosing, "facts_of", None)
    assert plan("emoji", "--hardware", "1xh200", "--plot", "x.svg") == 2
    assert "pip install 'parafuse[bench]'" in capsys.readouterr().err


def test_two_gpus_with_a_bridge_are_joined_by_it(folder: Path, monkeypatch) -> None:
    gpu = Gpu(name="NVIDIA GeForce RTX 3090", memory_bytes=int(24e9), capability="8.6", nvlinks=4)
    for links, joined in ((4, "nvlink-bridge"), (0, "pcie4-no-p2p")):
        found = [dataclasses.replace(gpu, nvlinks=links)] * 2
        monkeypatch.setattr(choosing, "visible_gpus", lambda found=found: found)
        assert machine_at_hand(2, "cuda", "bfloat16").inside.name == joined


def test_what_the_planner_keeps_can_be_seen_and_removed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--learned") == 0
    assert "nothing was learned" in capsys.readouterr().out
    known.keep_machine(machine(2), 2, *CPU)
    assert plan("--forget") == 0
    assert "1 files removed" in capsys.readouterr().out
    assert known.machine(2, *CPU) is None


def test_predictions_are_of_the_step(quick: None) -> None:
    cost = Costs(guided(), machine()).cost(Candidate(cfg=2))
    assert cost.step_s * guided().steps == pytest.approx(cost.denoise.total)


def test_a_source_without_files_is_told_apart() -> None:
    source = ModelSource(name="no/such", path="no/such", kind="hub", model_id="0")
    found = choose(Config(), source, 2, CPU)
    assert "is not in the local cache" in found.why


def _without_guidance() -> tuple[dict[str, int], np.ndarray]:
    call = {"width": 64, "height": 64, "num_inference_steps": 2}
    with Engine.from_pretrained("emoji", Config(device="cpu"), expect=call) as engine:
        output = engine("a red apple", seed=1, output_type="np", true_cfg_scale=1.0, **call)
        return engine.plan.degrees, output.images[0]


def test_a_call_without_guidance_is_no_error_where_nobody_asked_for_branches() -> None:
    """With degrees that were named it is one: `parallel.cfg=2: this call has no guidance branches`."""
    (degrees, first), (_, second) = run_ranks(_without_guidance, 2)
    assert degrees["cfg"] == 2
    call = {"width": 64, "height": 64, "num_inference_steps": 2}
    with Engine.from_pretrained("emoji", Config(device="cpu"), alone=True) as engine:
        want = engine("a red apple", seed=1, output_type="np", true_cfg_scale=1.0, **call).images[0]
    assert np.array_equal(first, second)
    assert np.abs(first - want).max() <= 1 / 255


def test_a_run_is_compared_with_its_prediction_and_kept(
    folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learned, "WIDEST", 1e9)  # however busy the machine is
    words = [
        "generate",
        "a red apple",
        "--steps",
        "3",
        "--width",
        "64",
        "--height",
        "64",
        "--out",
        str(folder / "a.png"),
    ]
    assert cli.run(cli.Launch(words, supervised=False)) == 0
    assert plan("--learned") == 0
    assert "nothing was learned" in capsys.readouterr().out, "control: nothing is kept unless it is asked for"
    assert cli.run(cli.Launch(words, supervised=False)) == 0
    assert "predicted" not in capsys.readouterr().out, "nothing is found out for it"
    assert cli.run(cli.Launch([*words, "--learn"], supervised=False)) == 0
    assert "learned: a step" in capsys.readouterr().err
    assert plan("--learned") == 0
    said = capsys.readouterr().out
    assert "emoji; 1 rank; float32 by cpu, estimated: a step took" in said
    assert "(in use)" in said
    assert "predictions for 1xcpu in float32 go by:" in said
    assert cli.run(cli.Launch(words, supervised=False)) == 0
    assert ", predicted " in capsys.readouterr().out, "it is known now"
