"""Caches in cases and records: what is refused, what is plotted, and which one is recommended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from parafuse.cache import METHODS, cache_of
from parafuse.config import LOSSY, Config
from parafuse.engine.source import locate
from parafuse.errors import ConfigError
from parafuse.launch import verify
from parafuse.launch.bench import command, report
from parafuse.launch.bench.case import Case, Variant, load_case
from parafuse.launch.bench.fidelity import over_prompts
from parafuse.launch.bench.figures import figures_of
from parafuse.launch.bench.plots import cache_lines, plots
from parafuse.launch.bench.record import FOLDER, Record, Row, load
from parafuse.launch.bench.trade import LEVELS, best, recommended, trades
from parafuse.launch.cli import CONFIG_OPTIONS, LOADING_OPTIONS
from parafuse.launch.prompts import first_prompts
from tests.unit.test_bench_records import PLAIN, record

ROOT = Path(__file__).parents[2]


def cached(name: str, *, speed: float, ssim: float, **more: Any) -> Row:
    """`speed` times as fast as PLAIN in every round; its worst picture is a little worse than the median."""
    figures = {"worst_psnr_db": 20.0, "worst_ssim": ssim - 0.1, "largest_of_255": 9.0, "psnr_db": 31.0, "ssim": 0.5}
    total_s = [s / speed for s in PLAIN.total_s]
    values: dict[str, Any] = dict(
        name=name, way="parafuse", ranks=1, total_s=total_s, step_s=[1e-9] * 3,
        quality=figures | {"median_ssim": ssim, "median_psnr_db": 30.0},
    )  # fmt: skip
    return Row(**values | more)


SAFE = cached("safe", speed=1.5, ssim=0.995, cache="first-block:0.1",
              counts={"denoiser calls": 56, "skipped calls": 14, "kept bytes": 2**20})  # fmt: skip
GOOD = cached("good", speed=2.0, ssim=0.96, cache="first-block:0.2")
FAST = cached("fast", speed=3.0, ssim=0.949, cache="first-block:0.5")
SERIES = cached("series", speed=1.9, ssim=0.97, cache="taylorseer:4")
WARMER = cached("warmer", speed=1.7, ssim=0.97, cache="first-block:0.2,warmup_steps=5")
COMPILED = cached("compiled", speed=9.0, ssim=0.999, cache="first-block:0.1", compile=True)
PEER = cached("peer", speed=1.2, ssim=0.96, way="cache-dit", threshold=0.2,
              counts={"denoiser calls": 56, "calls that ran the last block": 42})  # fmt: skip
BROKEN = Row(name="broken", way="cache-dit", ranks=1, error="did not act", quality={"worst_ssim": 1.0, "ssim": 1.0})
ALL = (PLAIN, GOOD, SAFE, FAST, SERIES, WARMER, COMPILED, PEER, BROKEN)


def made(*rows: Row, **more: Any) -> Record:
    return record(*rows, steps=28, **more)


@pytest.mark.parametrize(
    "text", ["first-block:0.2", "interval:2", "mask:101", "first-block:0.2,max_consecutive_skips=3"]
)
def test_the_shortest_text_makes_the_same_cache(text: str) -> None:
    cache = cache_of(text)
    assert cache is not None
    assert cache.brief == text
    assert cache_of(cache.brief) == cache == cache_of(str(cache))


def test_values_that_lose_are_in_their_shortest_form() -> None:
    """As records of `verify --quality` name them."""
    for text in Config.__dataclass_fields__["cache"].metadata[LOSSY]:
        cache = cache_of(text)
        assert cache is not None
        assert cache.brief == text
    kinds = {method: kind for method, kind in METHODS.items() if not getattr(kind, "needs_calibration", False)}
    assert all(kind().brief.startswith(method) for method, kind in kinds.items())


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (dict(cache="first-blok:0.1"), "variant 'v': cache='first-blok:0.1': 'first-blok' is no cache"),
        (dict(cache="first-block:-1"), "variant 'v': cache first-block: threshold=-1.0"),
        (dict(cache="interval:2", way="plain"), "cache is for way='parafuse', not for 'plain'"),
        (dict(cache="interval:2", share_of=2), "share_of=2: has no cache"),
        (dict(threshold=0.1), "threshold is for diffusers first-block cache, cache-dit"),
        (dict(threshold=0.1, way="xfuser"), "'xfuser' takes one nowhere"),
        (dict(threshold=0, way="cache-dit"), "threshold=0: must be a number above 0"),
        (dict(threshold="high", way="cache-dit"), "threshold='high': must be a number above 0"),
    ],
)
def test_a_variant_with_a_wrong_cache_is_said(given: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(seen)):
        Variant(name="v", **given)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (dict(prompts=-1), "prompts=-1: must be at least 0"),
        (dict(prompts=1), "prompts=1: must be at least 2"),
        (dict(prompts=2, call={"prompt": "a cat"}), "prompts=2: stands beside a prompt"),
        (dict(prompts=2, variants=(Variant(name="v", share_of=2),)), "prompts=2: shares paint no pictures"),
    ],
)
def test_a_case_with_wrong_prompts_is_said(given: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(seen)):
        Case(
            **{"name": "c", "theme": "c", "model": "emoji", "baseline": "v", "variants": (Variant(name="v"),), **given}
        )


def test_a_case_has_as_many_rounds_as_prompts() -> None:
    with pytest.raises(ConfigError, match="--rounds 65: case 'emoji-caches' has 64 prompts, one for each round"):
        command.prepare(command.Bench(case="emoji-caches", rounds=65, dirty=True), [], {})
    with pytest.raises(ConfigError, match="prompts=65: 'emoji' has 64 prompts"):
        first_prompts(locate("emoji"), 65)
    assert len(first_prompts(locate("emoji"), 64)) == 64
    assert first_prompts(locate("emoji"), 0) == ()


def test_the_case_of_caches_holds_alike_against_alike() -> None:
    case = load_case("emoji-caches")
    caches = {v.cache for v in case.variants}
    assert (case.prompts, case.call) == (64, {"num_inference_steps": 28})
    assert {f"first-block:{x}" for x in ("0", "0.2", "0.3", "0.4")} <= caches
    assert set(Config.__dataclass_fields__["cache"].metadata[LOSSY]) <= caches
    assert {v.threshold for v in case.variants if v.way == "diffusers first-block cache"} >= {0.1, 0.2, 0.3}
    assert all((not v.compile and v.ranks(2) == 1) or v.way == "cache-dit" for v in case.variants)


def test_figures_over_prompts() -> None:
    found = over_prompts({"ssim": [0.9, 1.0, 0.5], "worst_ssim": [0.9, 1.0, 0.5], "largest_of_255": [1, 9, 3]})
    assert found == pytest.approx({"ssim": 0.8, "worst_ssim": 0.5, "largest_of_255": 9, "median_ssim": 0.9})


def test_steps_of_a_cache_are_not_alike() -> None:
    """Whatever their median, it is requests that count."""
    found = figures_of(made(*ALL), GOOD)
    assert found is not None
    assert found.ratio.median == pytest.approx(2.0)
    assert (found.fraction, found.step_ratio) == (None, None)


def test_the_best_cache_is_the_fastest_that_is_good_enough() -> None:
    found = trades(made(*ALL))
    assert [one.name for one in found] == ["good", "safe", "fast", "series", "warmer", "compiled", "peer"]
    names = {level: [one and one.name for one in (best(found, level, ours=ours) for ours in (True, False))]
             for level in (*LEVELS, 0.9, 0.9999)}  # fmt: skip
    assert names == {0.99: ["safe", None], 0.95: ["good", "peer"], 0.9: ["fast", "peer"], 0.9999: [None, None]}
    first, second = recommended(made(*ALL))[2:4]
    assert first == "| 0.99 | `--cache first-block:0.1` | 1.50 (1.50 to 1.50) | none of these |  |"
    assert second == "| 0.95 | `--cache first-block:0.2` | 2.00 (2.00 to 2.00) | peer | 1.20 (1.20 to 1.20) |"


def test_a_page_says_what_caches_give_and_take() -> None:
    page = report.markdown(made(*ALL, prompts=["a cat", "a dog", "a fox"]))
    assert "| safe | 1.50 (1.50 to 1.50) | 0.9950 (0.895) | 30.0 (20.0) | 25% | 1.00 MiB |" in page
    assert "| peer | 1.20 (1.20 to 1.20) | 0.9600 (0.860) | 30.0 (20.0) | 25% |  |" in page
    assert "- 3 prompts, one for each round" in page
    assert "SSIM (worst)" not in report.markdown(made(PLAIN))


def test_a_line_goes_through_the_thresholds_of_one_method(tmp_path: Path) -> None:
    lines = {name: [one.name for one in points] for name, points in cache_lines([made(*ALL)]).items()}
    assert lines == {
        "first-block": ["safe", "compiled", "good", "fast"],
        "taylorseer": ["series"],
        "first-block, warmup_steps=5": ["warmer"],
        "cache-dit": ["peer"],
    }
    (peer,) = cache_lines([made(*ALL)])["cache-dit"]
    assert (peer.speed.median, peer.ssim, peer.worst_ssim) == (pytest.approx(1.2), 0.96, 0.86)
    names = {path.name for path in plots([made(*ALL)], tmp_path)}
    assert {"caches.svg", "caches.png"} <= names
    text = (tmp_path / "caches.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("safe", "warmer", "peer"))
    assert not {"caches.svg"} & {path.name for path in plots([made(PLAIN)], tmp_path)}


def test_caches_are_put_between_marks(tmp_path: Path) -> None:
    page = tmp_path / "caches.md"
    page.write_text("before\n<!-- caches:c -->\nold\n<!-- caches:c -->\nafter\n")
    assert report.into_page(page, made(*ALL), "r.json")
    text = page.read_text()
    assert "`--cache first-block:0.2`" in text
    assert "old" not in text
    assert text.endswith("(r.json).\n<!-- caches:c -->\nafter\n")
    assert not report.into_page(page, made(*ALL), "r.json")


def test_the_recommendation_is_that_of_the_newest_record() -> None:
    """Between its marks there is nothing as long as there is no record."""
    page = ROOT / "docs" / "caches.md"
    mark = report.CACHES_MARK.format(name="emoji-caches")
    found = [(load(path), path) for path in (ROOT / FOLDER).glob("emoji-caches_*.json")]
    if not found:
        assert f"{mark}\n{mark}" in page.read_text()
        return
    newest, path = max(found, key=lambda one: one[0].date)
    link = f"../{path.relative_to(ROOT).as_posix()}"
    assert report.caches_linked(newest, link) in page.read_text()
    assert len(newest.prompts) == 64


def test_who_takes_a_cache() -> None:
    """A command that would not use it does not offer it."""
    assert "cache" in {option.name for option in CONFIG_OPTIONS}
    assert "cache" not in {option.name for option in LOADING_OPTIONS}
    with pytest.raises(ConfigError, match="--cache interval:2: changes what verify holds to be the same"):
        verify.prepare(None, verify.Trial(ranks=2), CONFIG_OPTIONS, {"cache": "interval:2"})
    job = verify.prepare(None, verify.Trial(quality=True), CONFIG_OPTIONS, {"cache": "interval:2"})
    assert (job.world_size, job.config.cache) == (1, cache_of("interval:2"))
    with pytest.raises(ConfigError, match="or --cache or --quantize"):
        verify.prepare(None, verify.Trial(quality=True), CONFIG_OPTIONS, {})
