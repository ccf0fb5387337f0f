"""Which attention backend computes a call, why, and that each gives what fp64 gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from parafuse.attention import EXACT, LOSSY_BACKENDS, TIMED, TORCH, Attention, Row, Timings
from parafuse.engine import timings as kept
from parafuse.engine.extras import Extras
from parafuse.engine.tune import Shape, time_backends
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.kernels import packages
from parafuse.kernels.attention import Call, Choice, attention, choice_of
from parafuse.kernels.backends import BACKENDS, REGISTRY, attention_math
from parafuse.kernels.registry import Backend, Facts

B, H, S, N, D = 2, 6, 37, 53, 16
CPU = Facts(
    device="cpu", capability=None, dtype=torch.float32, head_size=64, value_size=64, is_grouped=False, mask="",
    is_causal=False, is_square=True, needs_lse=False,
)  # fmt: skip
HERE = [one for one in BACKENDS if not one.why_not_here("cpu")]


def tensors(*, groups: int = H, rows: int = S, size: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; the keys of every fourth run of 5 tokens are 4x larger."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, rows, size, generator=generator)
    k, v = (torch.randn(B, groups, N, size, generator=generator) for _ in range(2))
    k[:, :, torch.arange(N) // 5 % 4 == 1] *= 4.0
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def keys_mask(kind: str) -> Tensor | None:
    keep = torch.arange(N).remainder(3).ne(1).expand(B, 1, 1, N).clone()
    keep[1, ..., N // 2 :] = False
    return {"": None, "bool": keep, "bias": torch.zeros(B, 1, 1, N).masked_fill(~keep, -torch.inf)}[kind]


@pytest.mark.parametrize("backend", HERE, ids=lambda one: one.name)
@pytest.mark.parametrize("mask", ["", "bool", "bias"])
@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_each_gives_what_fp64_gives(backend: Backend, mask: str, groups: int, is_causal: bool) -> None:
    q, k, v = tensors(groups=groups, rows=N if is_causal else S)
    facts = replace(CPU, mask=mask, is_grouped=groups != H, is_causal=is_causal, head_size=D, value_size=D)
    call = Call(keys_mask(mask), None, is_causal)
    if backend.refusal(facts):
        assert Choice(backend.name).pick(facts, q, k, v, call).name != backend.name
        return
    choice = Choice(backend.name)
    out = attention(q, k, v, call, choice)
    want, want_lse = exact(q, k, v, call.mask, is_causal)
    assert rms(out, want) < 0.12 if backend.lossy else error(out, want) < 1e-5
    assert [one["backend"] for one in choice.report()] == [backend.name]
    if backend.has_lse:
        wide = [x.repeat_interleave(H // x.shape[1], 1) for x in (q, k, v)]
        lse = backend.run(wide[0], wide[1], wide[2], call.mask, D**-0.5, is_causal)[1]
        assert lse is not None
        assert lse.shape == q.shape[:3]
        assert error(lse, want_lse) < 1e-5


def test_long_rows_with_large_keys() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 5001, 24, generator=generator) for _ in range(3))
    k[:, :, ::7] *= 12.0
    want, want_lse = exact(q, k, v, None, False)
    for backend in HERE:
        out, lse = backend.run(q, k, v, None, 24**-0.5, False)
        assert rms(out, want) < 0.3 if backend.lossy else error(out, want) < 1e-5, backend.name
        assert lse is None or error(lse, want_lse) < 1e-5


def test_the_names_that_can_be_asked_for_are_those_that_there_are() -> None:
    assert set(REGISTRY.backends) == {*EXACT, *LOSSY_BACKENDS}
    assert {name for name, one in REGISTRY.backends.items() if one.lossy} == set(LOSSY_BACKENDS)
    with pytest.raises(ConfigError, match="did you mean 'flash-attn-3'"):
        Attention("flash-attn3")
    with pytest.raises(UnsupportedError, match="there are torch"):
        REGISTRY.pick(CPU, "xla")


def test_every_pick_has_its_reason_and_says_why_no_other() -> None:
    for facts in (CPU, replace(CPU, needs_lse=True), replace(CPU, dtype=torch.float64, needs_lse=True)):
        for asked in (TORCH, "cpu-flash", "flash", "fp8-reference"):
            pick = REGISTRY.pick(facts, asked)
            assert pick.reason
            assert set(pick.others) == set(REGISTRY.backends) - {pick.backend.name}
            assert all(pick.others.values())
            assert not facts.needs_lse or pick.backend.has_lse
    assert REGISTRY.pick(replace(CPU, needs_lse=True)).backend.name == "cpu-flash"
    assert REGISTRY.pick(replace(CPU, needs_lse=True, dtype=torch.float64)).backend.name == "math"
    fallen = REGISTRY.pick(CPU, "flash")
    assert (fallen.backend.name, fallen.reason) == ("torch", "flash needs a CUDA GPU")


def test_on_a_gpu_the_kernels_requirements_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = replace(CPU, device="cuda", capability=(9, 0), dtype=torch.bfloat16, head_size=128, value_size=128)
    ring = replace(gpu, needs_lse=True)
    assert REGISTRY.pick(ring).backend.name == "flash"
    assert REGISTRY.pick(replace(ring, mask="bool")).backend.name == "efficient"
    assert REGISTRY.pick(replace(ring, capability=(7, 5))).backend.name == "efficient"
    assert REGISTRY.pick(replace(ring, head_size=36, value_size=36)).backend.name == "math"
    assert REGISTRY.pick(gpu, "cudnn").backend.name == "cudnn"
    assert "up to 128" in REGISTRY.pick(replace(gpu, head_size=256, value_size=256), "cudnn").reason
    assert REGISTRY.pick(replace(gpu, is_causal=True, is_square=False), "flash").backend.name == "torch"
    assert "flash-attn-3 is not installed" in REGISTRY.pick(gpu, "flash-attn-3").reason


def timings(**seconds: float) -> Timings:
    row = Row(dtype="float32", head_size=64, mask="", is_causal=False, with_lse=False, shape="1x4x100x100x64",
              pairs=10_000, seconds={name.replace("_", "-"): s for name, s in seconds.items()})  # fmt: skip
    return Timings("this one", (row,))


def test_what_was_timed_decides_where_it_is_near_and_ahead() -> None:
    near, far = replace(CPU, pairs=20_000), replace(CPU, pairs=400_000)
    fast = timings(torch=2.0, cpu_flash=1.0, math=3.0, fp8_reference=0.1)
    pick = REGISTRY.pick(near, TIMED, fast)
    assert pick.backend.name == "cpu-flash"
    assert "lossy" in pick.others["fp8-reference"]
    assert "2e+03 ms" in pick.others["torch"]
    assert REGISTRY.pick(far, TIMED, fast).backend.name == "torch"
    assert REGISTRY.pick(replace(near, head_size=32, value_size=32), TIMED, fast).backend.name == "torch"
    assert REGISTRY.pick(near, TIMED, timings(torch=1.02, cpu_flash=1.0)).backend.name == "torch"  # a tie
    assert REGISTRY.pick(near, TIMED, timings(flash=0.1)).backend.name == "torch"  # not here


def test_timings_are_kept_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))
    assert kept.resolved(Attention(), "cpu") == Attention(TORCH)
    timed = time_backends(Shape.of("1x2x40x16"), dtype=torch.float32, device="cpu", rounds=1)
    assert set(timed.row.seconds) == {one.name for one in HERE}
    assert {name: why for name, why in timed.refused.items() if name in timed.row.seconds} == {}
    kept.save(Timings(kept.device_name("cpu")).with_row(timed.row).with_row(timed.row))
    found = kept.resolved(Attention(), "cpu")
    assert (found.backend, found.timings and found.timings.rows) == (TIMED, (timed.row,))
    assert kept.resolved(Attention(TORCH), "cpu") == Attention(TORCH)
    name = kept.device_name("cpu")
    (tmp_path / "attention.json").write_text(json.dumps([{"device": "x", "rows": 1}, {"device": name, "rows": []}]))
    assert kept.load("cpu") is None  # what is of another device is not looked at
    (tmp_path / "attention.json").write_text(json.dumps([{"device": name, "rows": [{"shape": 1}]}]))
    with pytest.raises(ConfigError, match="holds no timings"):
        kept.load("cpu")
    assert kept.resolved(Attention(), "cpu") == Attention(TORCH)  # with a line


def test_one_choice_goes_by_the_size_of_each_call() -> None:
    known = timings(torch=2.0, cpu_flash=1.0)
    choice = Choice(TIMED, known)
    small, large = (torch.randn(1, 1, rows, 64) for rows in (100, 1000))
    for q, name in ((small, "cpu-flash"), (large, "torch"), (small, "cpu-flash")):
        facts = replace(CPU, pairs=q.shape[2] ** 2)
        assert choice.pick(facts, q, q, q, Call()).name == name
    assert [one["calls"] for one in choice.report()] == [2, 1]


def test_a_backend_that_gives_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention_math(*args)
        return out * 1.1, lse

    monkeypatch.setitem(REGISTRY.backends, "math", replace(REGISTRY.backends["math"], run=wrong))
    timed = time_backends(Shape.of("1x2x40x16"), dtype=torch.float32, device="cpu", rounds=1)
    assert "math" not in timed.row.seconds
    assert "gives something else" in timed.refused["math"]


@pytest.mark.parametrize("text", ["1x2x3", "1x2xax4", "0x1x1x1", "", "1x2x3x4x5x6"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="must be batch x heads"):
        Shape.of(text)


def test_shapes_of_one_rank() -> None:
    assert str(Shape.of("1x24x4608x128").on_rank(2, 1)) == "1x12x4608x4608x128"
    on_ring = Shape.of("1x24x4608x512x128").on_rank(1, 3)
    assert (str(on_ring), on_ring.with_lse) == ("1x24x1536x171x128", True)


@pytest.mark.parametrize(
    ("name", "device", "ring", "says"),
    [
        ("flash-attn-3", "cpu", 1, "needs a CUDA GPU; here there are torch, cpu-flash, fp8-reference, math"),
        ("fp8-reference", "cpu", 2, "gives no log-sum-exp.*ring 2"),
        ("cpu-flash", "cpu", 2, ""),
    ],
)
def test_what_cannot_be_had_is_refused_up_front(name: str, device: str, ring: int, says: str) -> None:
    extras = Extras(attention=Attention(name))
    degree: Callable[[Any], int] = lambda axis: ring if axis == "ring" else 1  # noqa: E731
    if not says:
        extras.check(device, degree)
        return
    with pytest.raises(ConfigError, match=says):
        extras.check(device, degree)


def test_a_lossy_one_with_a_log_sum_exp_is_refused_in_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    able = replace(REGISTRY.backends["sage"], why_not_here=lambda device: "")
    monkeypatch.setitem(REGISTRY.backends, "sage", able)
    with pytest.raises(ConfigError, match=r"scales of the tokens at hand.*use ulysses"):
        Extras(attention=Attention("sage")).check("cuda", lambda axis: 2)


def test_operators_find_a_choice_by_its_name_as_long_as_it_lives() -> None:
    first, second = Choice.named(Attention("math"), "a part"), Choice.named(Attention(), "a part")
    assert (first.key, second.key) == ("a part", "a part 2")
    assert choice_of("a part") is first
    assert (first.acts, second.acts) == (True, False)
    del first
    assert choice_of("a part").asked == TORCH
    assert Choice.named(Attention("math"), "a part").key == "a part"


class Calls(list[dict[str, Any]]):
    """What a stand-in for a package was called with."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Packages by their documented signatures, computing in fp32 on this device."""
    calls = Calls()

    def rows_first(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        out, lse = attention_math(q, k, v, None, scale, causal)
        return out.transpose(1, 2), lse

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float = 0.0, causal: bool = False,
        window_size: Any = (-1, -1), return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        calls.append({"causal": causal})
        out, lse = rows_first(q, k, v, softmax_scale, causal)
        return (out, torch.nn.functional.pad(lse, (0, 91)), None) if return_attn_probs else out

    def flash_attn_3_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        return_attn_probs: bool,
        **scales: Tensor,
    ) -> Any:
        calls.append(dict(scales))
        group = q.shape[2] // k.shape[2]
        assert all(one.shape == (k.shape[0], k.shape[2]) for one in scales.values())
        if scales:
            q = q.float() * scales["q_descale"].repeat_interleave(group, 1)[:, None, :, None]
            k = k.float() * scales["k_descale"][:, None, :, None]
            v = v.float() * scales["v_descale"][:, None, :, None]
        return rows_first(q, k, v, softmax_scale, causal)

    def flash_attn_4_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_lse: bool
    ) -> Any:
        out, lse = rows_first(q, k, v, softmax_scale, causal)
        calls.append({})
        return out, lse if return_lse else None

    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool, sm_scale: float, return_lse: bool
    ) -> Any:
        calls.append({})
        assert tensor_layout == "HND"
        out, lse = attention_math(q, k, v, None, sm_scale, is_causal)
        return (out, lse) if return_lse else out

    made = {
        "flash_attn": flash_attn_func,
        "flash_attn.cute": flash_attn_4_func,
        "flash_attn_interface": flash_attn_3_func,
        "sageattention": sageattn,
    }
    for name, function in made.items():
        module = ModuleType(name)
        vars(module)["sageattn" if function is sageattn else "flash_attn_func"] = function
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("backend", packages.BACKENDS, ids=lambda one: one.name)
@pytest.mark.parametrize("groups", [H, 2])
def test_packages_are_called_as_they_document(backend: Backend, groups: int, installed: Calls) -> None:
    q, k, v = tensors(groups=groups)
    out, lse = backend.run(q, k, v, None, D**-0.5, False)
    want, want_lse = exact(q, k, v, None, False)
    assert len(installed) == 1
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    eight_bits = backend.name == "fp8"  # the stand-in of the other lossy one computes in fp32
    assert rms(out, want) < 0.12 if eight_bits else error(out, want) < 1e-5
    assert lse is not None
    assert error(lse, want_lse) < (0.2 if eight_bits else 1e-5)


def test_a_package_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(packages, "_version", lambda name: (1, 0))
    assert REGISTRY.backends["sage"].why_not_here("cuda") == "needs sageattention 2 or later"
    monkeypatch.setattr(packages, "_version", lambda name: (2, 8))
    assert REGISTRY.backends["sage"].why_not_here("cuda") == ""
    assert REGISTRY.backends["flash-attn-2"].why_not_here("cuda") == ""
    assert REGISTRY.backends["flash-attn-2"].why_not_here("cpu") == "needs a CUDA GPU"
