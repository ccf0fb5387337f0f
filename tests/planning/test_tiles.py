"""Decodes in tiles, and what would take too much memory: followed in seconds, with the same numbers."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import parafuse
from parafuse.config import VAE_AUTO, VAE_REPLICATED, VAE_TILED, Config
from parafuse.engine.memory.fake_pipeline import fake_mode
from parafuse.engine.memory.ledger import ACTIVATIONS, MOST_VALUES, Ledger
from parafuse.engine.planner import resolve
from parafuse.engine.planning import gather as gathering
from parafuse.engine.planning.choose import facts_of
from parafuse.engine.planning.facts import DECODE, PRODUCTS, Facts
from parafuse.engine.source import locate, source_of

LARGE = {"width": 320, "height": 192, "num_inference_steps": 1}
FRAMES = {"width": 512, "height": 320, "num_frames": 9, "num_inference_steps": 1}


def tiled(model: str, call: dict[str, Any]) -> Facts:
    source = locate(model)
    return gathering.gather(source, resolve(Config(device="cpu"), source, 1), call, tiled=True)


def numbers(found: Facts) -> dict[str, float]:
    (part,) = found.of(DECODE)
    families = {one.family for one in part.alone} & set(PRODUCTS)
    moved = {f"{name} bytes": sum(o.count * o.bytes.whole for o in part.alone if o.family == name) for name in families}
    calls = {f"{name} calls": sum(one.count for one in part.alone if one.family == name) for name in families}
    added = sum(one.count for one in part.alone if one.family in ("mul", "add", "copy_"))
    return {name: part.total(name) for name in families} | moved | calls | {"peak": part.peak_alone, "added": added}


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(("model", "call"), [("tiny:flux.1-dev", LARGE), ("tiny:hunyuanvideo", FRAMES)])
def test_tiles_are_counted_as_if_each_were_run(model: str, call: dict[str, Any], monkeypatch) -> None:
    runs = 0
    vae = type(parafuse.Engine.from_pretrained(model, alone=True).pipeline.vae.decoder)
    forward = vae.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(vae, "forward", counted)
    short = tiled(model, call)
    ran_short, runs = runs, 0

    @contextmanager
    def none(pipeline: Any, ledger: Any) -> Any:
        yield {"decoder": short.tiles}

    monkeypatch.setattr(gathering, "repeats", none)
    whole = tiled(model, call)
    assert ran_short < runs == short.tiles
    assert numbers(short) == pytest.approx(numbers(whole), rel=0.002)


def test_what_is_decoded_in_tiles_is_not_what_is_decoded_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))
    pipeline = parafuse.Engine.from_pretrained("tiny:flux.1-dev", alone=True).pipeline

    def facts(config: Config) -> Facts:
        return facts_of(source_of(pipeline), config, ("cpu", "float32"), LARGE, pipeline=pipeline)

    assert facts(Config()).tiles == 0
    by_config = facts(Config(vae="tiled"))
    pipeline.vae.enable_tiling()
    assert facts(Config()).tiles == by_config.tiles > 1


def test_who_shares_a_decode() -> None:
    found = tiled("tiny:flux.1-dev", {"width": 64, "height": 64, "num_inference_steps": 1})
    (part,) = found.of(DECODE)

    def shares(**changes: Any) -> bool:
        return gathering.Facts(**vars(found) | changes).shares(part)

    assert part.tokens < 4096
    assert not shares(vae=VAE_AUTO, tiles=0)
    assert shares(vae=VAE_AUTO, tiles=6)
    assert shares(vae=VAE_TILED)
    assert not shares(vae=VAE_REPLICATED, tiles=6)


def test_what_has_no_room_becomes_fake_inside_of_components_alone() -> None:
    """A mask over all pairs of pixels, from real indices: it would take 26 GB."""
    with fake_mode():
        module = torch.nn.Linear(2, 2)
    ledger, indices = Ledger(), torch.arange(160_000)
    ledger.know(module)
    ledger.kind = ACTIVATIONS
    with ledger:
        x, y = torch.meshgrid(indices, indices, indexing="xy")
        mask = torch.where(x <= y, 0, -float("inf"))
        small = torch.where(x[:4] <= y[:4], 0, 1)
    assert mask.numel() > MOST_VALUES
    assert isinstance(mask, FakeTensor)
    assert type(small) is torch.Tensor
    assert ledger.peaks["start"].nbytes > 4 * mask.numel()
    ledger.kind = "pipeline"
    with ledger:
        assert type(torch.zeros(MOST_VALUES // 2, 3, dtype=torch.bool)) is torch.Tensor
