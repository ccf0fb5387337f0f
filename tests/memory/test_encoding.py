"""Text encoders on one rank, and results that are kept: the pictures are those of one rank, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parafuse import Config, Engine
from parafuse.config import Axis, Parallel
from parafuse.encoding import OneRank, encoding_of
from parafuse.engine import node_loading
from parafuse.engine.apply import apply
from parafuse.engine.loader import load_pipeline
from parafuse.engine.source import locate
from parafuse.errors import ConfigError, RankError
from parafuse.parallel.encoding import TextEncoder, spread, take_apart
from parafuse.parallel.mesh import Mesh, make_mesh
from tests.dist.ranks import run_ranks
from tests.guided import sdxl
from tests.models import flux

CALL = {"num_inference_steps": 1, "output_type": "np", "height": 32, "width": 32}


@functools.cache
def loaded() -> Any:
    return load_pipeline(locate("emoji"), dtype="float32", allow_pickle=False)


def emoji() -> Any:
    """One of its own."""
    return copy.deepcopy(loaded())


def paint(pipeline: Any, prompt: Any, **more: Any) -> Any:
    return pipeline(prompt, generator=torch.Generator().manual_seed(3), **CALL, **more).images


def painted(degrees: dict[str, int], text: str) -> tuple[float, dict[str, Any], list[str], list[str]]:
    """Difference to one rank, what was done, the lines of it, and which encoders ran here."""
    plain, pipeline = emoji(), emoji()
    prompts = ["a cat", "two red apples on a table"]
    want = paint(plain, prompts)
    ran: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        part = getattr(pipeline, name)
        first = next(m for m in part.modules() if isinstance(m, nn.Linear))
        first.register_forward_hook(lambda *_, name=name: ran.append(name))
    handle = apply(pipeline, Config(parallel=Parallel(**degrees), text_encoders=text))
    got = paint(pipeline, prompts)
    seen = {name: dict(one.seen) for name, one in handle.encoders().items()}
    lines, mine = [line for line in handle.applied if line.startswith("text_encoder")], list(ran)
    handle.remove()
    again = paint(pipeline, prompts)
    assert np.array_equal(again, want)
    assert "forward" not in vars(pipeline.text_encoder)
    return float(abs(got - want).max()), seen, lines, mine


LAYOUTS = [{"ulysses": 2}, {"ring": 3, "ulysses": 1}, {"data": 2, "ulysses": 2}, {"data": 2, "ring": 2, "ulysses": 1}]


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_one_rank_encodes_and_the_pictures_stay(degrees: dict[str, int]) -> None:
    size = int(np.prod(list(degrees.values())))
    found = run_ranks(painted, size, degrees, "one-rank")
    for rank, (error, seen, lines, ran) in enumerate(found):
        assert error <= 1 / 255
        mine = {0: "text_encoder", 1: "text_encoder_2"}.get(rank)
        assert set(ran) == ({mine} if mine else set())
        for name, calls in seen.items():
            assert calls == ({"computed": 1} if name == mine else {"received": 1})
        assert lines == ["text_encoder: on rank 0 alone", "text_encoder_2: on rank 1 alone"]


def test_everywhere_is_nothing_on_top() -> None:
    error, seen, lines, _ = run_ranks(painted, 2, {"ulysses": 2}, "everywhere")[1]
    assert (seen, lines) == ({}, [])
    assert error <= 1 / 255


def given_bits(text: str) -> bool:
    """Whether what encoders give is what they give alone, bit for bit."""
    plain, pipeline = emoji(), emoji()
    handle = apply(pipeline, Config(text_encoders=text))
    same = True
    for prompts in (["a cat"], ["a cat", "a dog in the rain"], ["a cat"]):
        want, got = (p.encode_prompt(prompts, prompt_2=None, device="cpu") for p in (plain, pipeline))
        same &= all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    handle.remove()
    return same


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("text", ["one-rank", "one-rank:kept=2"])
def test_what_is_sent_is_bit_for_bit(ranks: int, text: str) -> None:
    assert all(run_ranks(given_bits, ranks, text))


def test_the_larger_one_has_a_rank_for_itself() -> None:
    assert spread([10, 90, 20], 2) == [1, 0, 1]
    assert spread([5, 5], 4) == [0, 1]
    assert spread([1, 2, 3], 1) == [0, 0, 0]


@dataclasses.dataclass
class Given:
    tensors: Any
    note: str


class Encoder(nn.Module):
    """Its result has tensors in several places, of several dtypes and strides."""

    def __init__(self, calls: list[int] | None = None) -> None:
        """`calls`: gets an entry for each call that is computed."""
        super().__init__()
        self.linear = nn.Linear(8, 8)
        if calls is not None:
            self.linear.register_forward_hook(lambda *_: calls.append(1))

    def forward(self, x: Tensor, *, times: int = 1) -> Any:
        y = self.linear(x)
        if times == 13:
            raise ValueError("not this time")
        return Given([y, {"half": y.bfloat16(), "turned": y.t(), "none": None, "whole": y.long()}], "text")

    def generate(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = self(x).tensors[0]
        return x


def alone(kept: int) -> tuple[Encoder, TextEncoder, list[int]]:
    torch.manual_seed(0)
    calls: list[int] = []
    module = Encoder(calls)
    one = TextEncoder(module, Mesh(None, {}, None), owner=0, kept=kept)
    one.install()
    return module, one, calls


def test_a_repeated_call_is_not_made_again() -> None:
    module, one, calls = alone(2)
    x = torch.randn(3, 8)
    first, second = module(x), module(x.clone())
    assert len(calls) == 1
    assert dict(one.seen) == {"computed": 1, "kept": 1}
    assert torch.equal(first.tensors[0], second.tensors[0])
    assert second.note == "text"
    second.tensors[0].zero_()  # pipelines may write into what they got
    assert torch.equal(module(x).tensors[0], first.tensors[0])


def test_other_arguments_are_another_call() -> None:
    module, _, calls = alone(8)
    x = torch.randn(3, 8)
    for call in (
        lambda: module(x),
        lambda: module(x + 1),
        lambda: module(x, times=2),
        lambda: module(x[:2]),
        lambda: module(x.reshape(1, 3, 8)[0], times=1),
    ):
        call()
    assert len(calls) == 5


def test_the_oldest_go() -> None:
    module, _, calls = alone(2)
    a, b, c = torch.randn(3, 1, 8)
    for x in (a, b, a, c, a, b):  # b goes when c comes
        module(x)
    assert len(calls) == 4


@pytest.mark.parametrize("change", ["written", "replaced", "attribute"])
def test_another_encoder_gives_something_else(change: str) -> None:
    module, one, calls = alone(2)
    x = torch.randn(3, 8)
    before = module(x).tensors[0]
    if change == "written":
        with torch.no_grad():
            module.linear.weight.mul_(2)
    elif change == "replaced":
        module.linear = nn.Linear(8, 8)
        module.linear.register_forward_hook(lambda *_: calls.append(1))
    else:
        module.linear.scaling = 2.0  # pyright: ignore[reportArgumentType]
    one.begin()
    after = module(x).tensors[0]
    assert len(calls) == 2
    assert torch.equal(before, after) == (change == "attribute")


@pytest.mark.parametrize("offload", [None, "model:to=disk"])
def test_weights_that_are_loaded_anew_between_calls_of_a_user(offload: str | None) -> None:
    pipeline, plain = emoji(), emoji()
    handle = apply(pipeline, Config(text_encoders="everywhere:kept=4", offload=offload))
    encode = {"prompt": ["a cat"], "prompt_2": None, "device": "cpu"}
    before = pipeline.encode_prompt(**encode)
    assert torch.equal(before[0], pipeline.encode_prompt(**encode)[0])
    assert handle.encoders()["text_encoder_2"].seen == {"computed": 1, "kept": 1}
    for name in ("text_encoder", "text_encoder_2"):
        more = {
            key: value * 1.5 for key, value in getattr(plain, name).state_dict().items() if value.is_floating_point()
        }
        for one in (plain, pipeline):
            getattr(one, name).load_state_dict(more, strict=False)
    for after, want in zip(pipeline.encode_prompt(**encode), plain.encode_prompt(**encode), strict=True):
        assert torch.equal(after, want)
    assert handle.encoders()["text_encoder_2"].seen["computed"] == 2
    handle.remove()


def test_nothing_is_kept_while_an_adapter_is_scaled_for_a_call() -> None:
    module, one, calls = alone(4)
    x = torch.randn(3, 8)
    module.linear.scaling = 1.0  # pyright: ignore[reportArgumentType]
    one.begin()
    module(x)
    module.linear.scaling = 0.5  # pyright: ignore[reportArgumentType]
    module(x)
    module.linear.scaling = 1.0  # pyright: ignore[reportArgumentType]
    module(x)
    assert len(calls) == 2


def test_what_is_drawn_is_not_kept() -> None:
    module, one, calls = alone(4)
    x = torch.randn(3, 8)
    assert torch.equal(module.generate(x, 2), module.generate(x, 2))
    assert dict(one.seen) == {"computed": 2}
    assert len(calls) == 4


def test_it_is_taken_off() -> None:
    module, one, _ = alone(4)
    one.remove()
    assert {"forward", "generate"}.isdisjoint(vars(module))


def test_a_result_is_taken_apart_whatever_it_is() -> None:
    found = take_apart(Given([torch.ones(2), (torch.zeros(1), "x")], "y"))
    assert len(found.tensors) == 2
    assert b"Given" in found.rest


def shared(owner: int, times: int) -> Any:
    mesh = make_mesh({axis: 2 if axis in (Axis.DATA, Axis.ULYSSES) else 1 for axis in Axis}, "cpu", 60.0)
    torch.manual_seed(0)
    calls: list[int] = []
    module = Encoder(calls)
    one = TextEncoder(module, mesh, owner=owner, kept=0)
    one.install()
    x = torch.randn(3, 8)
    want = module.linear(x)
    calls.clear()
    try:
        found = module(x, times=times)
    except (ValueError, RankError) as error:
        return f"{type(error).__name__}: {error}", len(calls)
    y, more = found.tensors
    same = [torch.equal(y, want), torch.equal(more["half"], want.bfloat16()), torch.equal(more["turned"], want.t())]
    same += [torch.equal(more["whole"], want.long()), more["none"] is None, found.note == "text"]
    computed = len(calls)
    return same, computed, torch.equal(module.generate(x, 2), module.linear(want))


@pytest.mark.parametrize("owner", [0, 1, 2, 3])
def test_any_rank_of_a_mesh_may_have_it(owner: int) -> None:
    for rank, (same, calls, generated) in enumerate(run_ranks(shared, 4, owner, 1)):
        assert all(same)
        assert generated
        assert calls == (1 if rank == owner else 0)


def test_a_fault_on_one_rank_is_a_fault_on_all() -> None:
    found = run_ranks(shared, 4, 2, 13)
    assert found[2] == ("ValueError: not this time", 1)
    for rank in (0, 1, 3):
        assert found[rank] == ("RankError: Encoder: failed on the rank that has it: ValueError: not this time", 0)


def with_engine(text: str) -> tuple[list[Any], list[str]]:
    config = Config(parallel=Parallel(ulysses=2), text_encoders=text)
    with Engine.from_pretrained("emoji", config) as engine:
        seen = []
        for prompt in ("a cat", "a dog", "a cat"):
            images = engine(prompt, seed=3, **CALL).images
            seen.append((images, engine.receipt["text_encoders"]))
        return seen, engine.receipt["applied"]


def test_the_engine_keeps_and_tells() -> None:
    seen, applied = run_ranks(with_engine, 2, "one-rank:kept=4")[0]
    assert [each["text_encoder"] for _, each in seen] == [{"computed": 2}, {"computed": 1, "kept": 1}, {"kept": 2}]
    assert [each["text_encoder_2"] for _, each in seen] == [{"received": 2}] * 3, "what is kept is its owner's to know"
    assert np.array_equal(seen[0][0], seen[2][0])
    assert "text_encoder: on rank 0 alone, keeps 4 results" in applied


def changing(text: str) -> list[dict[str, Any]]:
    """What encoders did in requests of a pipeline that asks for their hidden states: transformers puts hooks on an
    encoder for that, in the rank that computes."""
    config = Config(parallel=Parallel(data=2), text_encoders=text)
    with Engine.from_pipeline(sdxl.build(), config) as engine:
        found = []
        for _ in range(3):
            engine(**sdxl.call_text(2) | {"num_inference_steps": 1}, seed=[1, 2])
            found.append(engine.receipt["text_encoders"])
        return found


def test_encoders_may_change_in_their_calls() -> None:
    first, second = run_ranks(changing, 2, "one-rank:kept=4")
    for name in ("text_encoder", "text_encoder_2"):
        for both in zip(first, second, strict=True):
            own, other = sorted((set(each[name]) for each in both), key=lambda kinds: "received" in kinds)
            assert own <= {"computed", "kept"}
            assert other == {"received"}


class Counting(Encoder):
    """Writes down each call, as encoders of videos do with positions: its results are not kept."""

    def forward(self, x: Tensor, *, times: int = 1) -> Any:
        self.seen = torch.tensor([times])
        return super().forward(x, times=times)


def counted() -> list[dict[str, int]]:
    torch.manual_seed(0)
    mesh = make_mesh({**dict.fromkeys(Axis, 1), Axis.ULYSSES: 2}, "cpu", 20.0)
    module = Counting()
    one = TextEncoder(module, mesh, owner=0, kept=4)
    one.install()
    found: list[dict[str, int]] = []
    x = torch.ones(3, 8)
    for _ in range(3):
        one.begin()
        given = module(x).tensors[0]
        assert torch.equal(given, module.linear(x))
        found.append(dict(one.seen))
    return found


def test_ranks_do_not_decide_for_themselves_what_is_kept() -> None:
    first, second = run_ranks(counted, 2)
    assert first == [{"computed": 1}] * 3
    assert second == [{"received": 1}] * 3


def test_encoders_that_are_placed_keep_results_too(tmp_path: Path) -> None:
    config = Config(
        placement={"": "cpu", "transformer": "disk"}, offload_folder=str(tmp_path), text_encoders="everywhere:kept=2"
    )
    with Engine.from_pretrained("emoji", config) as engine:
        first, second = (engine("a cat", seed=1, **CALL).images for _ in range(2))
        assert engine.receipt["text_encoders"]["text_encoder"] == {"kept": 2}
        assert np.array_equal(first, second)


def test_encoders_that_are_not_there_are_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_loading, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    with pytest.raises(ConfigError, match="there is none of text_encoder"):
        Engine.from_pretrained("emoji", Config(text_encoders="everywhere:kept=2"), **without)


def test_one_rank_of_one_changes_nothing() -> None:
    with Engine.from_pretrained("emoji", Config(text_encoders="one-rank"), alone=True) as engine:
        assert not engine.handle.applied
    with Engine.from_pretrained("emoji", Config(text_encoders="everywhere:kept=2"), alone=True) as engine:
        assert engine.handle.applied == ["text_encoder: keeps 2 results", "text_encoder_2: keeps 2 results"]
        first, second = (engine("a cat", seed=1, **CALL).images for _ in range(2))
        assert engine.receipt["text_encoders"] == {"text_encoder": {"kept": 2}, "text_encoder_2": {"kept": 2}}
        assert np.array_equal(first, second)


def nothing_to_encode() -> Any:
    return apply(SimpleNamespace(transformer=flux(2)), Config(text_encoders="everywhere:kept=2"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Config(text_encoders="one_rank"), "did you mean 'one-rank'"),
        (lambda: Config(text_encoders="one-rank:kept=-1"), "kept=-1: must be a whole number of at least 0"),
        (lambda: Config(text_encoders="one-rank:keep=1"), "unknown key 'keep'; did you mean 'kept'"),
        (lambda: Config(text_encoders=7), "must be a text such as 'one-rank:kept=32'"),  # pyright: ignore
        (nothing_to_encode, "there is none of text_encoder"),
    ],
)
def test_faults_are_told(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_texts() -> None:
    assert str(encoding_of("one-rank")) == "one-rank:kept=0"
    assert encoding_of("one-rank:kept=3") == OneRank(kept=3)
    assert OneRank(kept=3).brief == "one-rank:kept=3"


def offloaded(text: str) -> list[tuple[int, dict[str, int]]]:
    """Bytes of text encoders that came to this rank in each of two requests, and what they did."""
    pipeline = emoji()
    handle = apply(pipeline, Config(parallel=Parallel(ulysses=2), text_encoders=text, offload="model:to=disk"))
    parts = ("text_encoder", "text_encoder_2")
    of_encoders = sum(p.nbytes for name in parts for p in getattr(pipeline, name).parameters())
    found: list[tuple[int, dict[str, int]]] = []
    for _ in range(2):
        with handle.request():
            pipeline.encode_prompt(["a cat"], prompt_2=None, device="cpu")
        came = handle.offloading.ledger.moved_bytes if handle.offloading else -1
        found.append((came * 100 // of_encoders, dict(handle.encoders()["text_encoder"].seen)))
    handle.remove()
    return found


def test_offloaded_weights_come_to_the_rank_that_computes_alone() -> None:
    """In percent of both text encoders."""
    first, second = run_ranks(offloaded, 2, "one-rank:kept=1")
    assert first[0][0] + second[0][0] == pytest.approx(100, abs=3)
    assert 30 < second[0][0] < 50 < first[0][0] < 70
    assert first[1] == (0, {"kept": 1})
    assert second[1] == (0, {"received": 1})
