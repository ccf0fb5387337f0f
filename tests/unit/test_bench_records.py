"""Cases, records and what is made of them: data, checked where it is read; ratios of the same round."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import parafuse
from parafuse.config import Config
from parafuse.engine.memory import check
from parafuse.engine.source import locate
from parafuse.errors import ConfigError
from parafuse.launch.bench import command, report
from parafuse.launch.bench.case import CASES, Case, Variant, load_case
from parafuse.launch.bench.compare import compared
from parafuse.launch.bench.figures import Spread, figures_of
from parafuse.launch.bench.plots import plots
from parafuse.launch.bench.record import Record, Row, commit, load, save, short_hardware

CASE = """model = "emoji"
baseline = "plain"
[[variant]]
name = "plain"
way = "plain"
[[variant]]
name = "two"
parallel = { ulysses = "all" }
needs_ranks = 2
"""


def row(name: str, *, steps: list[float], ranks: int = 1, **more: Any) -> Row:
    return Row(name=name, way="plain", ranks=ranks, step_s=steps, total_s=[10 * s for s in steps], **more)


def record(*rows: Row, **more: Any) -> Record:
    values: dict[str, Any] = dict(
        theme="t", case="c", model="emoji", baseline="plain", call={"prompt": "a cat"}, hardware="cpu2",
        machine={"cpu": "a CPU", "cores": 2}, versions={"torch": "2"}, commit="abc1234", dirty=False,
        date="2026-01-02T03:04Z", ranks=2, threads=1, device="cpu", dtype="float32",
        work={"gemm": 4e9, "attention": 2e9, "bytes": 1e8}, rates={"gemm": 1e11, "attention": 5e10, "bytes": 1e10},
        rows=list(rows),
    )  # fmt: skip
    return Record(**values | more)


PLAIN = row("plain", steps=[0.10, 0.20, 0.12])
SAME = {"worst_psnr_db": 99.0, "worst_ssim": 1.0, "largest_of_255": 0.0}
TWO = row("two", steps=[0.05, 0.08, 0.06], ranks=2, degrees={"ulysses": 2}, quality=SAME)
LOSSY = row("lossy", steps=[0.04, 0.08, 0.05], quality={"worst_psnr_db": 21.0, "worst_ssim": 0.9, "largest_of_255": 80})
FAILED = Row(name="peer", way="cache-dit", ranks=1, error="ImportError: no module")


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("*.toml")))
def test_cases_that_come_along_can_be_read(name: str) -> None:
    case = load_case(name)
    assert case.name == name
    assert case.baseline == "plain"
    assert any(v.way == "parafuse" for v in case.variants)
    locate(case.model)


BAD = [
    ("", "model is missing"),
    (
        CASE.replace('baseline = "plain"', 'baseline = "none"'),
        "baseline='none': must be one of its variants, plain, two",
    ),
    (CASE.replace('name = "two"', 'name = "plain"'), "two variants are named 'plain'"),
    (CASE.replace("ulysses", "ulises"), "parallel: unknown key 'ulises'; did you mean 'ulysses'?"),
    (CASE.replace('way = "plain"', 'way = "fast"'), "way='fast': must be one of plain, parafuse"),
    (CASE.replace("needs_ranks = 2", 'needs_ranks = "2"'), "needs_ranks='2': must be of type int"),
    (CASE.replace("needs_ranks", "need_ranks"), "unknown key 'need_ranks'; did you mean 'needs_ranks'?"),
    (CASE.replace('parallel = { ulysses = "all" }', "parallel = 3"), "parallel=3: must be a table"),
    (CASE + "[", "is no readable TOML"),
    ('model = "emoji"\nbaseline = "plain"\n', "has no [[variant]]"),
    (CASE.replace('way = "plain"', 'way = "plain"\nparallel = { cfg = 2 }'), "parallel is for way='parafuse'"),
]


@pytest.mark.parametrize(("text", "seen"), BAD, ids=[seen[:20] for _, seen in BAD])
def test_a_wrong_case_is_said(text: str, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(seen)):
        load_case(str(path))


def test_unknown_names_are_said() -> None:
    with pytest.raises(ConfigError, match=re.escape("--case 'emojy': must be one of emoji, emoji-batch")):
        load_case("emojy")
    with pytest.raises(ConfigError, match=re.escape("--variant 'ulises': emoji has plain")):
        load_case("emoji").only(("ulises",))


def test_variants_say_how_many_ranks_they_use() -> None:
    assert [v.ranks(3) for v in (Variant(name="a", way="plain"), Variant(name="b", needs_ranks=2))] == [1, 3]
    assert Variant(name="r", parallel={"ring": "all", "ulysses": 1}).config(3).degrees(3)["ring"] == 3  # type: ignore[index]
    with pytest.raises(ConfigError, match="cfg=2 makes 2 ranks, but there are 3"):
        Variant(name="c", parallel={"cfg": 2}).config(3)


def test_only_keeps_the_baseline() -> None:
    case = Case(name="c", theme="t", model="emoji", baseline="a", variants=tuple(Variant(name=n) for n in "abc"))
    assert [v.name for v in case.only(("c",)).variants] == ["a", "c"]


def test_a_case_in_its_tiny_form() -> None:
    case = load_case("hunyuanvideo")
    tiny = case.tiny()
    assert (tiny.model, tiny.theme) == ("tiny:hunyuanvideo", "hunyuanvideo-tiny")
    assert set(tiny.call) == {"prompt", "output_type"}
    assert (case.largest_share, case.whole_steps, tiny.whole_steps) == (8, 30, 0)
    with pytest.raises(ConfigError, match="--tiny: case 'emoji' measures 'emoji'"):
        load_case("emoji").tiny()


def test_other_engines_that_are_not_here_are_left_out_unless_named() -> None:
    names = {variant.name for variant in load_case("emoji").variants if variant.way == "xfuser"}
    with patch.object(command.importlib.util, "find_spec", lambda name: None if name == "xfuser" else True):
        left = {variant.name for variant in command._installed(load_case("emoji"), ()).variants}
        kept = {variant.name for variant in command._installed(load_case("emoji"), tuple(names)).variants}
    assert names
    assert not names & left
    assert names <= kept
    assert {"plain", "diffusers: first-block cache", "cache-dit"} <= left


def test_shares_are_measured_without_a_launcher() -> None:
    case = Case(name="c", theme="c", model="emoji", baseline="plain",
                variants=(Variant(name="plain", way="plain"), Variant(name="half", share_of=2)))  # fmt: skip
    command._check_layouts(case, 1)
    with pytest.raises(ConfigError, match="variant 'half' is a share"):
        command._check_layouts(case, 2)


@pytest.mark.parametrize(("rounds", "warm_ups", "seen"), [(1, 2, "rounds=1"), (2, 0, "warm_ups=0")])
def test_a_case_says_how_often(rounds: int, warm_ups: int, seen: str) -> None:
    with pytest.raises(ConfigError, match=f"case 'c': {seen}: must be at least"):
        Case(name="c", theme="c", model="emoji", baseline="plain", rounds=rounds, warm_ups=warm_ups,
             variants=(Variant(name="plain", way="plain"),))  # fmt: skip


def test_the_least_time_of_a_share_has_its_wire() -> None:
    share = row("share", steps=[0.05, 0.08, 0.06], share_of=2, wire_s=0.04)
    one, two = (figures_of(record(PLAIN, r, steps=4, link={"bytes_per_s": 1e9}), r) for r in (PLAIN, share))
    assert one is not None
    assert two is not None
    assert two.least_s == pytest.approx(one.least_s / 2 + 0.01)


def test_a_cache_is_judged_by_requests() -> None:
    """Its steps are not alike: a median of them would be that of a skipped step."""
    skips = row("skips", steps=[0.01, 0.01, 0.01])
    skips.way, skips.total_s = "cache-dit", [0.8, 1.9, 1.0]
    found = figures_of(record(PLAIN, skips, steps=6, whole_steps=28), skips)
    assert found is not None
    assert found.ratio.median == pytest.approx(1.2)
    assert (found.fraction, found.flops, found.whole_s) == (None, None, None)


def test_a_request_that_is_not_extrapolated_is_not_shown_as_one() -> None:
    silent = row("silent", steps=[])
    silent.total_s = [1.0, 1.0, 1.0]
    lines = report.markdown(record(PLAIN, silent, steps=6, whole_steps=28)).splitlines()
    (line,) = [line for line in lines if line.startswith("| silent | 1 |  | ")]
    assert "1000.0 ms" not in line


def test_weights_are_read_by_every_rank_of_a_sequence() -> None:
    work = {"gemm": 0.0, "attention": 0.0, "bytes": 10e9, "weights": 8e9}
    rows = {degrees: row("r", steps=[1.0, 1.0, 1.0], ranks=2, degrees={degrees: 2}) for degrees in ("ulysses", "cfg")}
    found = {name: figures_of(record(PLAIN, one, work=work), one) for name, one in rows.items()}
    assert {name: one.bytes for name, one in found.items() if one} == {"ulysses": 9e9, "cfg": 5e9}


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (dict(link={"bytes_per_s": "fast"}), "must be numbers"),
        (dict(link={"bytes_per_s": 0}), "bytes_per_s must be above 0"),
        (dict(dtype="half"), "dtype='half': must be one of"),
        (dict(whole_steps=3, call={"num_inference_steps": 4}), "whole_steps=3: must be at least the 4"),
        (dict(whole_steps=9, variants=(Variant(name="plain", way="plain", call={"num_inference_steps": 4}),)),
         "variant 'plain': num_inference_steps cannot differ"),
    ],
)  # fmt: skip
def test_a_case_that_would_mislead_is_refused(change: dict[str, Any], seen: str) -> None:
    values: dict[str, Any] = dict(name="c", theme="c", model="emoji", baseline="plain",
                                  variants=(Variant(name="plain", way="plain"),))  # fmt: skip
    with pytest.raises(ConfigError, match=re.escape(seen)):
        Case(**values | change)


def test_only_what_is_alike_is_compared() -> None:
    for name, value in (("dtype", "bfloat16"), ("ranks", 3), ("link", {"bytes_per_s": 1.0}), ("call", {})):
        with pytest.raises(ConfigError, match=f"{name} is .* measure alike"):
            compared(record(PLAIN, TWO), record(PLAIN, TWO, **{name: value}))


def test_a_source_without_its_repository_is_not_taken_as_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "parafuse" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(parafuse, "__file__", str(package))
    assert commit() == (f"v{parafuse.__version__}", False)
    (tmp_path / "pyproject.toml").touch()
    assert commit() == ("unknown", True)
    for named, seen in (("abc1234", ("abc1234", False)), ("abc1234-dirty", ("abc1234", True))):
        monkeypatch.setenv("PARAFUSE_COMMIT", named)
        assert commit() == seen


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "h200x2"), ("NVIDIA H100 80GB HBM3", "h100x2"), ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090x2"),
     ("NVIDIA", "gpux2")],
)  # fmt: skip
def test_a_records_name_has_its_hardware(gpu: str, name: str) -> None:
    assert short_hardware(gpu, 2) == name
    assert short_hardware("", 2).startswith("cpu")


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory_bytes", lambda: 24 * 10**9)
    with pytest.raises(ConfigError, match=r"'random:flux.1-dev': its weights take 6\d GB in float32, and this machine"):
        check.check_memory(locate("random:flux.1-dev"), Config(device="cpu"), 1)
    check.check_memory(locate("tiny:flux.1-dev"), Config(device="cpu"), 1)
    check.check_memory(locate("emoji"), Config(device="cpu"), 1)
    monkeypatch.setattr(check, "memory_bytes", lambda: 80 * 10**9)
    check.check_memory(locate("random:flux.1-dev"), Config(device="cpu"), 1)


def test_a_keyword_that_the_pipeline_does_not_take_is_said(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(CASE.replace("baseline", 'call = { prompt = "a", num_inference_stepz = 2 }\nbaseline', 1))
    with pytest.raises(ConfigError, match="has no 'num_inference_stepz'; did you mean 'num_inference_steps'"):
        command.prepare(command.Bench(case=str(path), dirty=True), [], {})


def test_ratios_are_of_the_same_round() -> None:
    found = figures_of(record(PLAIN, TWO), TWO)
    assert found is not None
    assert found.step_ratio == Spread(2.0, 2.0, 2.5)
    assert found.total_ratio.median == pytest.approx(2.0)
    # products 40 ms and attention 40 ms on one rank, half of it on each of two; 10 ms of bytes are less
    assert found.least_s == pytest.approx(0.04)
    assert found.fraction == pytest.approx(0.04 / 0.06)
    assert found.flops == pytest.approx(6e9 / 2 / 0.06)


def test_a_failed_variant_has_no_figures_and_a_row() -> None:
    assert figures_of(record(PLAIN, FAILED), FAILED) is None
    assert "| peer | 1 | ImportError: no module |" in report.markdown(record(PLAIN, FAILED))


def test_the_page_has_every_figure() -> None:
    text = report.markdown(record(PLAIN, TWO, LOSSY, starts_s={"two": {"cold": 12.3, "warm": 4.5}}))
    assert "| two | 2 | 60.0 ms (50.0 to 80.0) | 2.00 (2.00 to 2.50) |" in text
    assert "the same picture" in text
    assert "PSNR 21.0 dB, SSIM 0.900" in text
    assert "| two | 12.3 s | 4.5 s |" in text


def test_records_are_kept_and_never_overwritten(tmp_path: Path) -> None:
    first, second = (save(record(PLAIN, TWO), tmp_path) for _ in range(2))
    assert [path.name for path in (first, second)] == [
        "t_cpu2_2026-01-02_abc1234.json",
        "t_cpu2_2026-01-02_abc1234-2.json",
    ]
    assert load(first) == record(PLAIN, TWO)
    assert dataclasses.replace(record(), dirty=True).name.endswith("_abc1234-dirty")


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"schema": 2}, "schema=2: must be 1; measure again with this version"),
        ({"rows": [{"name": "x"}]}, "is no whole record"),
        ({"speed": 1}, "unknown key 'speed'"),
    ],
)
def test_a_record_of_another_kind_is_said(change: dict[str, Any], seen: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(dataclasses.asdict(record(PLAIN)) | change))
    with pytest.raises(ConfigError, match=re.escape(seen)):
        load(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="is no record of parafuse bench"):
        load(path)


def test_two_records_are_compared_by_their_spread() -> None:
    same = row("two", steps=[0.055, 0.09, 0.05], ranks=2)
    slower = row("two", steps=[0.10, 0.19, 0.13], ranks=2)
    assert [line[3] for line in compared(record(PLAIN, TWO), record(PLAIN, same))] == ["within the spread"]
    assert [line[3] for line in compared(record(PLAIN, TWO), record(PLAIN, slower))] == ["50% slower"]
    assert [line[3] for line in compared(record(PLAIN, TWO), record(PLAIN))] == ["in one of them only"]
    with pytest.raises(ConfigError, match="cannot be compared; give two of one case"):
        compared(record(PLAIN), record(PLAIN, case="other"))


def test_plots_are_written_in_both_formats(tmp_path: Path) -> None:
    made = plots([record(PLAIN, TWO, LOSSY)], tmp_path)
    assert sorted(path.name for path in made) == sorted(
        f"{name}{suffix}" for name in ("ladder", "scaling", "quality") for suffix in (".svg", ".png")
    )
    assert all(path.stat().st_size > 1000 for path in made)
    before = (tmp_path / "ladder.svg").read_bytes()
    plots([record(PLAIN, TWO, LOSSY)], tmp_path)
    assert (tmp_path / "ladder.svg").read_bytes() == before


def test_a_ladder_is_put_between_marks(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench:c -->\nold\n<!-- bench:c -->\nafter\n")
    assert report.into_page(page, record(PLAIN, TWO), "results/r.json")
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- bench:c -->\n| variant |")
    assert "(results/r.json)" in text
    assert not report.into_page(page, record(PLAIN, TWO), "results/r.json")
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="must have '<!-- bench:c -->' or '<!-- caches:c -->' twice"):
        report.into_page(page, record(PLAIN), "x")
    assert page.read_text() == "no marks"


def test_the_readmes_tables_are_those_of_their_records() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    found = re.findall(r"<!-- bench:[\w-]+ -->\n.*?From \[[^]]+\]\(([^)]+)\)\.\n<!-- bench:[\w-]+ -->", text, re.DOTALL)
    assert len(found) == 2
    for link in found:
        assert report.linked(load(root / link), link) in text
