"""Weights that are cut between ranks (offload to=ranks): the same results, a part of the weights on each rank, and
bytes that are what the formulas say."""

from __future__ import annotations

import math
import threading
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import parafuse
from parafuse.errors import ConfigError
from parafuse.parallel.carry import HostCarrier
from parafuse.parallel.image import ALIGN
from parafuse.parallel.ranks_home import RanksHome
from tests.dist.ranks import RankFailure, run_ranks
from tests.memory.test_offload import EXACT, combination, config, made
from tests.models import build, error

CUT, KEPT = "group:to=ranks", "group:to=ranks,keep_originals=true"
LAYERS, WHOLE = "group:level=leaf,to=ranks,keep_originals=true", "model:to=ranks,keep_originals=true"

COMBINATIONS: list[tuple[str, dict[str, int], dict[str, Any], str, str]] = [
    ("flux", dict(ulysses=2), {}, "", KEPT),
    ("flux", dict(ulysses=3), {}, "", KEPT),
    ("flux", dict(ulysses=2, ring=2), {}, "", KEPT),
    ("wan", dict(ring=2), {}, "int8", KEPT),
    ("weaver", dict(ulysses=2), {}, "", KEPT),
    ("weaver", dict(ulysses=2), {}, "", LAYERS),
    ("flux", dict(ulysses=2), {}, "", WHOLE),
    ("wan", dict(cfg=2, ulysses=2), {}, "", KEPT),
    ("flux", dict(data=2, ulysses=2), {}, "", KEPT),
    ("wan", dict(cfg=2, ulysses=2), {"cache": "interval:2"}, "", KEPT),
    ("flux", dict(ulysses=2), {"cache": "first-block:0.3"}, "", KEPT),
    ("wan", dict(ulysses=2), {"cache": "pab:2,2,2"}, "", KEPT),
    ("flux", dict(ulysses=3), {"compile": True}, "", KEPT),
    ("flux", dict(ulysses=2), {"compile": True, "cache": "first-block:0.3"}, "int8", KEPT),
]


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize(("name", "layout", "asked", "more", "offload"), COMBINATIONS)
def test_combined(name: str, layout: dict[str, int], asked: dict[str, Any], more: str, offload: str) -> None:
    """The same as with whole weights on every rank, and put back where the originals are kept."""
    for got in run_ranks(combination, math.prod(layout.values()), name, layout, asked, more, offload):
        assert got["error"] <= EXACT
        assert got["decisions"] == got["plain"]["decisions"]
        assert got["graphs"] == got["plain"]["graphs"]
        assert got["moved"]["fetches"] > 0
        assert got["restored"]


def cut(degree: int, ahead: int) -> dict[str, Any]:
    """What one call of a model gives, keeps and sends, with its weights cut."""
    model, values = made("flux")
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    total = sum(x.nbytes for x in model.parameters())
    with torch.no_grad():
        want = model(**values)[0].clone()
    asked = config(dict(ulysses=degree), offload=f"{CUT},prefetch={ahead}")
    with parafuse.apply(model, asked) as handle, torch.no_grad(), handle.request():
        found = handle.offloading
        assert found is not None
        residence = next(iter(found.turn._members))
        home, images = residence.home, [unit.image.nbytes for unit in residence.units]
        assert isinstance(home, RanksHome)
        here = home.nbytes
        got = model(**values)[0].clone()
        moved = found.ledger.report()
        with handle.at_home():
            same = all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        sent = handle.exchanged()["weights.all_gather"]
        lines = list(handle.applied)
    return {
        "error": error(got, want), "here": here, "total": total, "images": images, "moved": moved,
        "sent": (sent.calls, sent.bytes), "same": same, "lines": lines,
        "left": sum(bool(x.isnan().any()) for x in model.parameters()), "weights": len(list(model.parameters())),
    }  # fmt: skip


@pytest.mark.parametrize(("degree", "ahead"), [(2, 1), (3, 0), (4, 2)])
def test_each_rank_has_its_part_and_sends_it_as_often_as_units_come(degree: int, ahead: int) -> None:
    for got in run_ranks(cut, degree, degree, ahead):
        assert got["error"] <= EXACT
        assert got["here"] * degree == sum(got["images"])
        filler = len(got["images"]) * ALIGN * degree + ALIGN * got["weights"]
        assert got["total"] / degree <= got["here"] <= (got["total"] + filler) / degree
        calls, sent = got["sent"]
        looked = len(got["images"])  # at_home brings each once more
        assert calls == got["moved"]["fetches"] + looked
        assert sent * degree == (got["moved"]["moved_bytes"] + sum(got["images"])) * (degree - 1)
        stays, *blocks = got["images"]
        assert got["moved"]["most_resident_bytes"] <= stays + (ahead + 1) * max(blocks)
        assert got["same"]
        assert any(" of it here, 4 units one by one" in line for line in got["lines"])


def test_taken_off_it_is_without_weights() -> None:
    found = run_ranks(cut, 2, 2, 1)
    assert all(got["left"] == got["weights"] for got in found)


def noted() -> list[str]:
    model, _ = made("flux")
    said: list[str] = []
    with mock.patch("parafuse.engine.apply.note", said.append):
        parafuse.apply(model, config(dict(ulysses=2), offload=CUT)).remove()
        parafuse.apply(build("flux"), config(dict(ulysses=2), offload=KEPT)).remove()
    return said


def test_a_word_on_weights_that_are_gone() -> None:
    for said in run_ranks(noted, 2):
        lines = [line for line in said if "keep_originals" in line]
        assert len(lines) == 1
        assert lines[0].startswith("FluxTransformer2DModel: stays without weights, of which this rank has a part")


def changed() -> float:
    """The error after weights were changed by hand, on all ranks alike."""
    model, values = made("flux")
    again, _ = made("flux")
    with torch.no_grad():
        for x in again.parameters():
            x.mul_(1.1)
        want = again(**values)[0]
    with parafuse.apply(model, config(dict(ulysses=2), offload=CUT)) as handle, torch.no_grad(), handle.request():
        model(**values)
        with handle.at_home():
            for x in model.parameters():
                x.mul_(1.1)
        return error(model(**values)[0], want)


def test_weights_that_were_changed_at_home_are_what_comes() -> None:
    assert max(run_ranks(changed, 2)) <= EXACT


# in which order


class Watched(RanksHome):
    """A home of one rank that knows who begins."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def begin(self, number: int, out: Tensor) -> Any:
        self.threads.append(threading.get_ident())
        return None


def test_what_comes_ahead_begins_in_the_thread_that_computes() -> None:
    """In another one, ranks would begin in different orders, and get parts of different units."""
    home, carrier = Watched(), HostCarrier()
    carrier.start(home, 0, 8, ahead=True)
    assert home.threads == [threading.get_ident()]


def failing(rank_that_fails: int) -> str:
    model, values = made("flux")
    with parafuse.apply(model, config(dict(ulysses=2), offload=CUT), mesh=None) as handle, torch.no_grad():
        blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
        handle.exchanged()
        if dist.get_rank() == rank_that_fails:
            blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        model(**values)
    return "done"


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(RankFailure, match="ZeroDivisionError"):
        run_ranks(failing, 2, 1, timeout_s=60.0)


# what cannot be


BAD: list[tuple[dict[str, Any], str]] = [
    ({"offload": "group:to=rank"}, "did you mean 'ranks'"),
    ({"offload": "group:keep_originals=true"}, "give to=ranks too"),
    ({"offload": "group:to=ranks,keep_originals=7"}, "must be true or false"),
    ({"offload": "group:to=ranks,folder=/tmp/x"}, "give to=disk too"),
    ({"offload": CUT, "text_encoders": "one-rank"}, "use text_encoders='everywhere'"),
    ({"offload": CUT, "placement": "balanced"}, "leave one of both out"),
]


@pytest.mark.parametrize(("values", "said"), BAD)
def test_bad_options(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parafuse.Config(**values)


def test_one_rank_has_nobody_to_share_with() -> None:
    with pytest.raises(ConfigError, match=r"give parallel.ulysses or parallel.ring of at least 2"):
        parafuse.apply(build("flux"), parafuse.Config(offload=CUT))
    with pytest.raises(ConfigError, match=r"give parallel.ulysses or parallel.ring of at least 2"):
        parafuse.Engine.from_pretrained("emoji", parafuse.Config(offload=CUT))


def refused(layout: dict[str, int]) -> str:
    model, _ = made("flux")
    with pytest.raises(ConfigError) as failure:
        parafuse.apply(model, config(layout, offload=CUT))
    assert not any(x.isnan().any() for x in model.parameters())
    return str(failure.value)


@pytest.mark.parametrize("layout", [dict(cfg=2, ulysses=1), dict(data=2, ulysses=1)])
def test_ranks_that_make_other_calls_cannot_share(layout: dict[str, int]) -> None:
    for said in run_ranks(refused, 2, layout):
        assert "give parallel.ulysses or parallel.ring of at least 2" in said


def taken_off_and_asked_again() -> tuple[str, int]:
    model, values = made("flux")
    with parafuse.apply(model, config(dict(ulysses=2), offload=CUT)), torch.no_grad():
        model(**values)
    with pytest.raises(ConfigError) as failure:
        parafuse.apply(model, config(dict(ulysses=2)))
    with parafuse.apply(build("flux"), config(dict(ulysses=2), offload=CUT)) as handle:
        return str(failure.value), sum(count.calls for count in handle.exchanged().values())


def test_a_model_that_was_cut_is_not_taken_again_and_its_exchanges_are_not_counted() -> None:
    for said, calls in run_ranks(taken_off_and_asked_again, 2):
        assert "FluxTransformer2DModel: its weights were cut between ranks" in said
        assert calls == 0
