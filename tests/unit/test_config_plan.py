"""What is asked and what will run: wrong values are refused by field, value and way out; plans survive a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parafuse import Config, Parallel, Plan
from parafuse.config import Axis
from parafuse.engine import planner
from parafuse.engine.planner import resolve
from parafuse.engine.request import facts
from parafuse.engine.source import ModelSource
from parafuse.errors import ConfigError

SOURCE = ModelSource(name="emoji", path="/nowhere", kind="folder", model_id="0123456789abcdef")


def message(function: Any, *args: Any, **kwargs: Any) -> str:
    """The text of the ConfigError that must come."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_plan(**changes: Any) -> Plan:
    degrees = {str(axis): 1 for axis in Axis} | {"ring": 2, "ulysses": 3}
    values: dict[str, Any] = dict(
        model="emoji", model_id="0123", world_size=6, degrees=degrees, device="cpu", dtype="float32", timeout_s=600.0
    )
    return Plan(**(values | changes))


@pytest.mark.parametrize("axis", list(Axis))
@pytest.mark.parametrize("degree", [0, -1, 1.5, 2.0, "2", True, None, [2]])
def test_degrees_are_whole_numbers(axis: Axis, degree: Any) -> None:
    found = message(Parallel, **{str(axis): degree})
    assert found == f"parallel.{axis}={degree!r}: must be a whole number of at least 1."


def test_guidance_has_three_branches_at_most() -> None:
    assert Parallel(cfg=3).degrees(6)[Axis.ULYSSES] == 2
    assert message(Parallel, cfg=4).startswith("parallel.cfg=4: guidance has at most 3 branches, mostly 2; use")


@pytest.mark.parametrize("axis", ["pipe", "tensor"])
def test_axes_that_do_not_run_yet_are_refused(axis: str) -> None:
    found = message(Parallel, **{axis: 2})
    assert found.startswith(f"parallel.{axis}=2: this version runs only 1 on the {axis!r} axis; use parallel.cfg")


@pytest.mark.parametrize("axis", ["data", "cfg", "ring"])
def test_axes_that_are_run_may_be_left_to_be_chosen(axis: str) -> None:
    values: dict[str, Any] = {axis: "auto"}
    assert Parallel(**values).is_chosen
    assert Parallel().is_chosen
    assert not Parallel(cfg=2).is_chosen
    assert not Parallel(ulysses=2).is_chosen


@pytest.mark.parametrize("axis", ["pipe", "tensor"])
def test_others_may_not(axis: str) -> None:
    assert message(Parallel, **{axis: "auto"}).startswith(f"parallel.{axis}='auto'")


def test_what_nobody_has_chosen_is_one() -> None:
    degrees = Parallel(ring="auto", cfg="auto", ulysses=2).degrees(2)
    assert (degrees[Axis.RING], degrees[Axis.CFG], degrees[Axis.DATA]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("parallel", "world_size", "expected"),
    [
        (Parallel(), 1, (1, 1)),
        (Parallel(), 4, (1, 4)),
        (Parallel(ring=2), 6, (2, 3)),
        (Parallel(ring=3), 3, (3, 1)),
        (Parallel(ulysses=2), 2, (1, 2)),
        (Parallel(ring=2, ulysses=2), 4, (2, 2)),
    ],
)
def test_auto_takes_the_ranks_that_are_left(parallel: Parallel, world_size: int, expected: tuple[int, int]) -> None:
    degrees = parallel.degrees(world_size)
    assert list(degrees) == list(Axis)
    assert (degrees[Axis.RING], degrees[Axis.ULYSSES]) == expected


@pytest.mark.parametrize(
    ("parallel", "world_size", "start"),
    [
        (Parallel(ulysses=2), 3, "parallel: ulysses=2 makes 2 ranks, but there are 3. Start 2,"),
        (Parallel(ulysses=2), 1, "parallel: ulysses=2 makes 2 ranks, but there is 1."),
        (Parallel(ring=2, ulysses=2), 2, "parallel: ring=2 x ulysses=2 makes 4 ranks, but there are 2."),
        (Parallel(ring=2), 3, "parallel: ring=2 makes 2 ranks, but there are 3. Start 2, or a multiple of it, or"),
        (Parallel(ulysses=1), 2, "parallel: all axes 1 makes 1 ranks, but there are 2."),
    ],
)
def test_degrees_that_do_not_make_the_ranks(parallel: Parallel, world_size: int, start: str) -> None:
    assert message(parallel.degrees, world_size).startswith(start)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_the_product_of_the_degrees_is_the_number_of_ranks(ring: int, ulysses: int, world_size: int) -> None:
    try:
        degrees = Parallel(ring=ring, ulysses=ulysses).degrees(world_size)
    except ConfigError:
        assert ring * ulysses != world_size
    else:
        assert ring * ulysses == world_size
        assert (degrees[Axis.RING], degrees[Axis.ULYSSES]) == (ring, ulysses)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("parallel", {"ring": 2}, "must be parafuse.Parallel(...)"),
        ("dtype", "fp16", "must be one of auto, float32, bfloat16, float16"),
        ("device", "gpu", "must be one of auto, cpu, cuda"),
        ("timeout_s", 0, "must be from 1 to 86400 seconds"),
        ("timeout_s", float("nan"), "must be from 1 to 86400 seconds"),
        ("timeout_s", float("inf"), "must be from 1 to 86400 seconds"),
        ("timeout_s", "60", "must be from 1 to 86400 seconds"),
        ("timeout_s", True, "must be from 1 to 86400 seconds"),
        ("allow_pickle", "false", "must be true or false"),
        ("allow_pickle", 1, "must be true or false"),
    ],
)
def test_config_fields_are_checked(field: str, value: Any, allowed: str) -> None:
    assert message(Config, **{field: value}) == f"{field}={value!r}: {allowed}."


def test_config_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().dtype = "float32"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(Parallel())  # type: ignore[call-arg]


def test_config_survives_a_file(tmp_path: Path) -> None:
    config = Config(
        parallel=Parallel(ring=2, ulysses=3), dtype="bfloat16", device="cpu", timeout_s=5, allow_pickle=True
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert Config.from_file(file) == config
    file.write_text("{}")
    assert Config.from_file(str(file)) == Config()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"dtyp": "float32"}, "config: unknown key 'dtyp'; did you mean 'dtype'?"),
        ({"parallel": {"ulyses": 2}}, "config: parallel: unknown key 'ulyses'; did you mean 'ulysses'?"),
        (
            {"parallel": {"xyz": 2}},
            "config: parallel: unknown key 'xyz'; allowed: cfg, data, pipe, ring, tensor, ulysses.",
        ),
        ({"parallel": 2}, "parallel=2: must be an object of axis: degree."),
        ({"parallel": {"ring": "two"}}, "parallel.ring='two': must be a whole number of at least 1."),
    ],
)
def test_wrong_keys_in_a_config_name_the_nearest(values: dict[str, Any], found: str) -> None:
    assert message(Config.from_dict, values) == found


@pytest.mark.parametrize(("text", "found"), [("{", "cannot be read as JSON"), ("[1]", "must hold one JSON object")])
@pytest.mark.parametrize(("kind", "load"), [("config", Config.from_file), ("plan", Plan.load)])
def test_files_that_hold_something_else(tmp_path: Path, text: str, found: str, kind: str, load: Any) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    assert message(load, file).startswith(f"{kind}={str(file)!r}: {found}")
    assert "does not exist, or is no file" in message(load, tmp_path / "missing.json")


def test_plan_survives_a_file_and_a_receipt(tmp_path: Path) -> None:
    plan = make_plan(why="because")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "receipt.json").write_text(json.dumps({"seed": 7, "plan": plan.to_dict()}))
    assert Plan.load(tmp_path / "receipt.json") == plan
    assert (plan.degree(Axis.RING), plan.sequence_degree) == (2, 6)
    assert plan.one_line() == "6 ranks: ring 2, ulysses 3, float32 on cpu (because)"


def test_digest_follows_every_field() -> None:
    other = {str(axis): 1 for axis in Axis} | {"ring": 3, "ulysses": 2}
    changed = [
        dict(model="x"),
        dict(model_id="x"),
        dict(degrees=other),
        dict(device="cuda"),
        dict(dtype="float16"),
        dict(timeout_s=5.0),
    ]
    found = {str(facts(make_plan(**change).to_dict())) for change in [*changed, {}]}
    assert len(found) == len(changed) + 1
    assert facts(make_plan().to_dict()) == facts(make_plan().to_dict())


ONES = {str(axis): 1 for axis in Axis}


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"degrees": ONES | {"ulysses": 4}}, "parallel: ulysses=4 makes 4 ranks, but there are 6."),
        (
            {"degrees": {"ring": 2, "ulysses": 3}},
            "plan.degrees={'ring': 2, 'ulysses': 3}: must give a degree for each of",
        ),
        ({"degrees": [2, 3]}, "plan.degrees=[2, 3]: must give a degree for each of data, cfg,"),
        ({"degrees": ONES | {"ulysses": "auto"}}, "plan.degrees="),
        ({"degrees": ONES | {"ulysses": 6.0}}, "parallel.ulysses=6.0: must be a whole number"),
        ({"degrees": ONES | {"cfg": 6}}, "parallel.cfg=6: guidance has at most 3 branches"),
        ({"degrees": ONES | {"ulises": 6}}, "plan.degrees: unknown key 'ulises'; did you mean 'ulysses'?"),
        ({"world_size": "6"}, "plan.world_size='6': must be a whole number"),
        ({"device": "auto"}, "plan.device='auto'"),
        ({"dtype": "float8"}, "dtype='float8': must be one of"),
        ({"timeout_s": -1}, "timeout_s=-1: must be from 1"),
        ({"schema": 99}, "plan.schema=99: this version reads schema 1"),
        ({"devise": "cpu"}, "plan: unknown key 'devise'; did you mean 'device'?"),
    ],
)
def test_plans_that_nobody_resolved_are_refused(change: dict[str, Any], start: str) -> None:
    """A plan is read from a file that anyone may have edited: what it says is checked before it decides anything."""
    assert message(Plan.from_dict, make_plan().to_dict() | change).startswith(start)


def test_a_plan_that_misses_a_key() -> None:
    values = make_plan().to_dict()
    del values["dtype"]
    assert message(Plan.from_dict, values).startswith("plan: key 'dtype' is missing.")
    del values["degrees"]
    assert message(Plan.from_dict, values).startswith("plan: key 'degrees' is missing.")


def test_replay_is_refused_for_another_model_or_world_size() -> None:
    plan = make_plan()
    plan.check(model_id="0123", world_size=6)
    assert message(plan.check, model_id="9999", world_size=6).startswith("plan.model_id='0123': made for 'emoji'")
    assert message(plan.check, model_id="0123", world_size=4).startswith("plan.world_size=6: there are 4 ranks.")


def test_resolving_makes_everything_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(planner, "num_cuda_devices", lambda: 0)
    plan = resolve(Config(), SOURCE, 4)
    assert (plan.degree(Axis.ULYSSES), plan.degree(Axis.RING), plan.device, plan.dtype) == (4, 1, "cpu", "float32")
    assert "ulysses" in plan.why
    assert "auto" not in json.dumps(plan.to_dict())
    assert resolve(Config(parallel=Parallel(ulysses=4)), SOURCE, 4).why == ""
    assert resolve(Config(), SOURCE, 1).why == ""
    assert message(resolve, Config(device="cuda"), SOURCE, 1).startswith("device='cuda': 1 rank on this machine, but 0")
    assert message(resolve, Config(parallel=Parallel(ring=3)), SOURCE, 4).startswith("parallel: ring=3")


@pytest.mark.parametrize(
    ("devices", "local", "device"), [(4, None, "cuda"), (3, None, "cpu"), (2, "2", "cuda"), (1, "2", "cpu")]
)
def test_cuda_is_used_where_each_local_rank_has_one(
    monkeypatch: pytest.MonkeyPatch, devices: int, local: str | None, device: str
) -> None:
    monkeypatch.setattr(planner, "num_cuda_devices", lambda: devices)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    plan = resolve(Config(), SOURCE, 4)
    assert (plan.device, plan.dtype) == (device, "bfloat16" if device == "cuda" else "float32")
