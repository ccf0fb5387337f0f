"""A case measured on two ranks; options that do nothing are caught; peers that fail are rows."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from parafuse.config import Config, Parallel
from parafuse.engine.caches import skipping
from parafuse.launch.bench import contestant as contestant_module
from parafuse.launch.bench.case import Case, Variant
from parafuse.launch.bench.contestant import Contestant
from parafuse.launch.bench.model import load
from parafuse.launch.bench.quality import Verdict, judge, write
from parafuse.launch.bench.record import NotAppliedError, Record
from parafuse.launch.bench.run import Run
from parafuse.parallel import bundle, guidance
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import attempt
from tests.measuring.quick import quick

PLAIN = Variant(name="plain", way="plain")
CFG = Variant(name="cfg", parallel={"cfg": 2}, needs_ranks=2)
PEER = Variant(name="peer", way="xfuser", needs_ranks=2)
CACHE = Variant(name="cache", way="diffusers first-block cache")
OURS = Variant(name="ours", cache="interval:2,warmup_steps=0,final_steps=0")


SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}


def case(*variants: Variant, prompts: int = 0, **call: Any) -> Case:
    call = {"num_inference_steps": 2, "width": 64, "height": 64} | call | ({} if prompts else {"prompt": "a red apple"})
    return Case(
        name="small", theme="test", model="emoji", baseline="plain", variants=variants, call=call, prompts=prompts
    )


def measured(*variants: Variant, **more: Any) -> Record:
    with quick():
        return Run(case(*variants, **more), load("emoji", Config()), 2, Config(timeout_s=60)).measure({})


def whole() -> dict[str, Any]:
    return dataclasses.asdict(measured(PLAIN, CFG, PEER))


def test_a_case_on_two_ranks() -> None:
    record, _ = run_ranks(whole, 2)
    plain, cfg, peer = record["rows"]
    assert [len(row["step_s"]) for row in (plain, cfg)] == [2, 2]
    assert cfg["counts"]["cfg.all_gather calls"] == 2
    assert cfg["counts"]["cfg.all_gather bytes"] > 0
    assert (cfg["degrees"], len(cfg["memory_bytes"])) == ({"cfg": 2}, 2)
    assert cfg["quality"]["largest_of_255"] <= 1
    assert plain["shares"]["GEMM"] > 0.1
    assert cfg["shares"]["communication"] > 0
    assert abs(sum(plain["shares"].values()) - 1) < 0.02
    assert record["work"]["gemm"] > record["work"]["attention"] > 0
    assert peer["error"].startswith("ModuleNotFoundError")
    assert peer["step_s"] == []


def two_prompts() -> float:
    """How far the pictures of replicas are from those of the plain pipeline, which runs between their requests."""
    both = {"prompt": ["a red apple", "a rocket"]}
    data = Variant(name="data", parallel={"data": 2}, needs_ranks=2, call=both)
    return measured(dataclasses.replace(PLAIN, call=both), data).rows[1].quality.get("largest_of_255", 0.0)


def test_variants_have_nothing_of_each_other() -> None:
    assert max(run_ranks(two_prompts, 2)) <= 1


def judged() -> tuple[int, list[dict[str, float]], list[int], dict[str, bool], list[str]]:
    loaded = load("emoji", Config())
    config = Config(parallel=Parallel(cfg=2))
    verdict, pairs = judge(
        loaded, loaded.pipeline, config, ["red apple", "no such thing"], {"num_inference_steps": 6}, seed=3
    )
    if not pairs:
        return 0, [], [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(path.name for path in write(verdict, pairs, Path(folder)))
        json.loads((Path(folder) / "quality.json").read_text())
    figures = [one.quality for one in verdict.judged]
    return len(pairs), figures, [len(one.step_errors) for one in verdict.judged], verdict.judged[1].right, names


def test_pictures_of_a_configuration_against_one_rank() -> None:
    (count, figures, steps, unknown, names), other = run_ranks(judged, 2)
    assert count == 2
    assert max(one["largest_of_255"] for one in figures) <= 1
    assert (steps, unknown) == ([6, 6], {})
    assert names == ["quality.json", "quality.md", "step_error.png", "step_error.svg", "worst.png"]
    assert other[0] == 0


def changed() -> tuple[float, float]:
    """Worst ratio and last error where the second rank's branch is scaled: what is not the same must show."""
    exchange = bundle.exchange

    def scaled(*args: Any) -> Any:
        found = exchange(*args)
        return [found[0], [x * 1.05 for x in found[1]]]

    with patch.object(guidance, "exchange", scaled):
        config = Config(parallel=Parallel(cfg=2))
        loaded = load("emoji", Config())
        verdict, pairs = judge(loaded, loaded.pipeline, config, ["red apple"], {"num_inference_steps": 6}, seed=3)
    return (verdict.judged[0].quality["worst_psnr_db"], verdict.judged[0].step_errors[-1]) if pairs else (0.0, 0.0)


def test_a_changed_branch_shows_in_every_figure() -> None:
    psnr, error = run_ranks(changed, 2)[0]
    assert psnr < 45
    assert error > 1e-3


def no_ops() -> list[str]:
    """An axis that exchanges nothing."""
    found = []
    with patch.object(Contestant, "count", lambda *_: None):
        found.append(attempt(measured, PLAIN, CFG))
    return found


def alone() -> list[Any]:
    """A compile that compiles nothing; another engine's cache that never skips, which is a row without figures."""
    found: list[Any] = []
    with patch.object(Contestant, "_compile", lambda *_: None):
        found.append(attempt(measured, PLAIN, Variant(name="compiled", way="plain", compile=True)))
    ways = {**contestant_module.PEERS, CACHE.way: lambda pipeline, *_: pipeline}
    with patch.object(contestant_module, "PEERS", ways):
        found.append(measured(PLAIN, CACHE).rows[1].error)
    return found


def patched(pipeline: Any, *_: Any) -> Any:
    """As an engine that patches classes."""
    type(pipeline).__call__ = type(pipeline.transformer).forward = lambda *_, **__: None
    raise RuntimeError("and then it fails")


def beside_a_patch() -> list[str]:
    ways = {**contestant_module.PEERS, CACHE.way: patched}
    with patch.object(contestant_module, "PEERS", ways):
        return [row.error for row in measured(CACHE, PLAIN).rows]


def test_an_engine_that_patches_classes_changes_none_but_its_own() -> None:
    assert run_ranks(beside_a_patch, 1) == [["RuntimeError: and then it fails", ""]]


@pytest.mark.whole
def test_an_option_that_does_nothing_leaves_no_record() -> None:
    for (text,) in run_ranks(no_ops, 2):
        assert text.startswith(
            "NotAppliedError: nothing is recorded, since what was asked for did not act: cfg: cfg: no byte"
        )
    compiled, cache = run_ranks(alone, 1)[0]
    assert "compiled: compile: no graph was run" in compiled
    assert NotAppliedError.__name__ in compiled
    assert cache == "did not act: diffusers first-block cache: no block was skipped"


def cached() -> list[dict[str, Any]]:
    """A cache on one rank, on as many as there are, and one that may never skip, over prompts of their own."""
    never = Variant(name="never", cache="first-block:0")
    both = [Variant(name="both", cache=OURS.cache, parallel={"cfg": 2}, needs_ranks=2)]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    record = measured(PLAIN, OURS, never, *(both if ranks > 1 else []), prompts=2, **SMALL)
    return [dataclasses.asdict(record), *(dataclasses.asdict(row) for row in record.rows)]


def test_caches_act_on_one_rank_and_on_several() -> None:
    record, plain, ours, never, both = run_ranks(cached, 2)[0]
    assert (ours["ranks"], ours["cache"], both["ranks"]) == (1, "interval:2,warmup_steps=0,final_steps=0", 2)
    for row in (ours, both):
        assert (row["counts"]["denoiser calls"], row["counts"]["skipped calls"]) == (8, 2)  # the first one is looked at
        assert row["counts"]["kept bytes"] > 10_000
    assert "skipped calls" not in never["counts"]
    assert never["quality"]["largest_of_255"] == 0
    for name, found in both["quality_by_round"].items():
        assert found == pytest.approx(ours["quality_by_round"][name], rel=1e-3)
    assert len(record["prompts"]) == len(plain["total_s"]) == 2 == len(set(record["prompts"]))
    psnr = ours["quality_by_round"]["worst_psnr_db"]
    assert len(set(psnr)) == 2
    assert ours["quality"]["worst_psnr_db"] == min(psnr) < 60
    assert "prompt" not in record["call"]


def measured_small(*variants: Variant) -> Record:
    return measured(*variants, **SMALL)


def idle() -> str:
    """A cache that was put on and decides nothing but to compute."""
    with patch.object(skipping, "is_bound", lambda *_: True):
        return attempt(measured_small, PLAIN, OURS, Variant(name="never", cache="first-block:0"))


def test_a_cache_that_skips_nothing_leaves_no_record() -> None:
    (text,) = run_ranks(idle, 1)
    assert "ours: cache interval:2,warmup_steps=0,final_steps=0: no call was skipped" in text
    assert NotAppliedError.__name__ in text
    assert "never" not in text, "threshold 0 is asked to skip nothing"


def judged_with_a_cache() -> Verdict | None:
    loaded, config = load("emoji", Config()), Config(cache="interval:2,warmup_steps=0,final_steps=0")
    verdict, pairs = judge(loaded, loaded.pipeline, config, ["red apple"], SMALL, seed=3)
    with tempfile.TemporaryDirectory() as folder:
        write(verdict, pairs, Path(folder))
        page = (Path(folder) / "quality.md").read_text()
    assert "one rank and cache interval:2,warmup_steps=0,final_steps=0 in float32" in page
    assert "The cache skipped 25% of the calls." in page
    return verdict


def test_pictures_of_a_cache_against_those_without() -> None:
    (verdict,) = run_ranks(judged_with_a_cache, 1)
    assert verdict is not None
    assert (verdict.cache, verdict.skipped) == ("interval:2,warmup_steps=0,final_steps=0", 0.25)
    assert verdict.judged[0].quality["worst_psnr_db"] < 60
