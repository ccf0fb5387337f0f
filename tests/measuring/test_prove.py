"""One report: plain diffusers, parafuse's plan and other engines, side by side."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from parafuse.cache import IntervalCache, cache_of
from parafuse.errors import ConfigError
from parafuse.launch import prove
from parafuse.launch.cli import CONFIG_OPTIONS
from tests.dist.ranks import run_ranks
from tests.measuring.quick import quick

PLAIN_NAMES = ("plain", "parafuse (cfg 2)", "diffusers context parallel", "diffusers first-block cache")
"""The last one does nothing on emoji: only rank 0 sees that, and both must leave it out."""


def proven(out: str) -> None:
    """A proof of emoji on this world's ranks, without what compiles: that takes long."""
    proof = prove.Proof(steps=2, first=2, rounds=2, out=out, peers=True, quiet=True)
    job = prove.prepare(None, proof, CONFIG_OPTIONS, {"cfg": "2"})
    kept = tuple(variant for variant in job.case.variants if variant.name in PLAIN_NAMES)
    with quick():
        prove.run(dataclasses.replace(job, case=dataclasses.replace(job.case, variants=kept)))


def test_a_report_has_everything_inside(tmp_path: Path) -> None:
    run_ranks(proven, 2, str(tmp_path), timeout_s=120.0)
    (page,), (data,) = tmp_path.glob("*.html"), tmp_path.glob("*.json")
    assert page.stem == data.stem
    assert page.stem.startswith("prove-emoji_cpu")
    found = json.loads(data.read_text())
    plain, ours, theirs, cache = found["record"]["rows"]
    assert [row["name"] for row in (plain, ours, theirs, cache)] == list(PLAIN_NAMES)
    assert theirs["error"]
    assert cache["error"].startswith("did not act")
    assert found["record"]["call"]["height"] == 128
    assert set(plain["parts_s"]) == {"text", "denoising", "VAE", "file"}
    assert ours["degrees"] == {"cfg": 2}
    painted = found["pictures"]
    assert [(one["variant"], one["seed"]) for one in painted] == [(n, s) for s in (0, 1) for n in PLAIN_NAMES[:2]]
    assert all(one["quality"]["largest_of_255"] <= 1 for one in painted if one["variant"] != "plain")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "parafuse (cfg 2): a request is " in text
    assert "the same picture" in text
    assert f'<li class="error">diffusers context parallel: {theirs["error"].split(":")[0]}' in text


def variants(typed: dict[str, Any], **more: Any) -> list[tuple[str, str, dict[str, Any], bool]]:
    job = prove.prepare("a red apple", prove.Proof(quiet=True, **more), CONFIG_OPTIONS, typed)
    return [(v.name, v.way, v.parallel, v.compile) for v in job.case.variants]


def test_what_is_held_against_what() -> None:
    plain = [("plain", "plain", {}, False), ("plain + compile", "plain", {}, True)]
    assert variants({}) == [*plain, ("parafuse", "parafuse", {}, False)]
    four = variants({"ring": "2"}, ranks=4)
    assert four[:2] == plain
    degrees = {"ring": 2, "ulysses": 2}
    assert four[2:] == [
        ("parafuse (ring 2, ulysses 2)", "parafuse", degrees, False),
        ("parafuse (ring 2, ulysses 2) + compile", "parafuse", degrees, True),
    ]
    cached = variants({"cache": "first-block:0.3", "ring": "2"}, ranks=2)
    assert cached[-1] == ("parafuse (ring 2, cache first-block:0.3)", "parafuse", {"ring": 2, "ulysses": 1}, False)
    assert variants({"cache": "interval:2"})[3:] == [("parafuse (cache interval:2)", "parafuse", {}, False)]
    alone = [way for _, way, _, _ in variants({}, peers=True)[3:]]
    assert alone == ["diffusers first-block cache", "cache-dit", "para-attn first-block cache"]
    assert len(variants({}, peers=True, ranks=2)) == 4 + 6


def test_a_cache_stands_beside_the_exact_plan() -> None:
    job = prove.prepare("a red apple", prove.Proof(), CONFIG_OPTIONS, {"cache": "interval:2"})
    exact, cached = (v for v in job.case.variants if v.way == "parafuse")
    assert (exact.cache, cache_of(cached.cache), cached.may_fail) == ("", IntervalCache(2), True)


def test_the_prompts_of_a_proof() -> None:
    job = prove.prepare(None, prove.Proof(first=3), CONFIG_OPTIONS, {})
    assert len(job.prompts) == 3
    assert job.case.call["prompt"] == job.prompts[0]
    for model in ("tiny:flux.1-dev", "somebody/some-model"):
        assert len(prove.prepare(None, prove.Proof(model=model, ranks=2), CONFIG_OPTIONS, {}).prompts) == 2
    assert prove.prepare("a red apple", prove.Proof(), CONFIG_OPTIONS, {}).prompts == ("a red apple",)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (dict(first=0), "--first 0: must be at least 1"),
        (dict(rounds=1), "--rounds 1: must be at least 2"),
        (dict(model="emojy"), "did you mean 'emoji'"),
        (dict(prompts="no/such.txt"), "--prompts 'no/such.txt': does not exist"),
        (dict(steps=0), "--steps 0"),
    ],
)
def test_wrong_input_is_said_before_anything_is_loaded(given: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(seen)):
        prove.prepare(None, prove.Proof(**given), CONFIG_OPTIONS, {})
