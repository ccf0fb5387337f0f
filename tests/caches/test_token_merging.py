"""Token merging: the matching itself, what it does to a UNet, compile, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.engine.caches.token_merging import grid_of, merge
from parafuse.errors import UnsupportedError
from tests.caches.steps import later, letters
from tests.caches.test_parts import EXACT, Graphs, unet, unet_inputs
from tests.models import error
from tests.zoo.collect import outputs


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 7), (2, 2)])
def test_one_token_of_each_two_by_two_is_a_target(rows: int, columns: int) -> None:
    grid = grid_of(rows, columns, torch.device("cpu"))
    cells = {(int(i) // columns // 2, int(i) % columns // 2) for i in grid.targets_D}
    assert len(cells) == len(grid.targets_D) == (rows // 2) * (columns // 2)
    both = torch.cat([grid.sources_S, grid.targets_D])
    assert torch.equal(both[grid.back_N], torch.arange(rows * columns))


def test_tokens_that_are_equal_merge_without_loss() -> None:
    """Four directions, one in each of four 2 x 2: merged, attended and taken apart they are what they were."""
    columns = torch.eye(4).repeat_interleave(2, 0)[:4]
    picture = torch.cat([columns.repeat(2, 1), (2 - columns).repeat(2, 1)])  # 4 x 4 tokens of 4 channels
    x = torch.stack([picture, picture.flip(-1)])
    grid = grid_of(4, 4, x.device)
    merged, back = merge(x, grid, 12)
    assert merged.shape == (2, 4, 4)
    assert error(back(merged), x) <= EXACT


def test_the_most_alike_are_merged_first_and_into_the_mean() -> None:
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(2))
    grid = grid_of(4, 4, x.device)
    x[0, grid.sources_S[3]] = 3 * x[0, grid.targets_D[1]]  # the same direction: merges first
    merged, back = merge(x, grid, 1)
    assert merged.shape == (1, 15, 8)
    mean = 2 * x[0, grid.targets_D[1]]
    assert error(merged[0, -len(grid.targets_D) + 1], mean) <= EXACT
    rest = [i for i in range(16) if i not in (int(grid.sources_S[3]), int(grid.targets_D[1]))]
    assert torch.equal(back(merged)[0, rest], x[0, rest])
    assert torch.equal(*(back(merged)[0, i] for i in (grid.sources_S[3], grid.targets_D[1])))


def run(cache: str, *, compile: Any = None, batch: int = 2) -> tuple[list[Tensor], list[str]]:
    model: Any = unet()
    with parafuse.apply(model, parafuse.Config(cache=cache or None)) as handle, handle.request() as memories:
        if compile:
            model.compile_repeated_blocks(fullgraph=True, backend=compile)
        found = [outputs(model, later(unet_inputs(batch), step))[0] for step in range(3)]
        return found, letters(memories["UNet2DConditionModel"]) if memories else []


def test_a_unet_with_fewer_tokens() -> None:
    """Nothing merged: the same picture; more merged: further from it. Samples do not touch each other."""
    plain, none, some, many = (run(cache)[0] for cache in ("", *(f"token-merging:{x}" for x in (0.0, 0.25, 0.75))))
    assert max(map(error, none, plain)) == 0.0
    assert 100 * EXACT < error(some[0], plain[0]) < error(many[0], plain[0]) < 1
    assert run("token-merging:0.5")[1] == ["cc"] * 3
    model = unet()
    with parafuse.apply(model, parafuse.Config(cache="token-merging:0.5")):
        both = outputs(model, unet_inputs(2))[0]
        one = {name: x[:1] if isinstance(x, Tensor) and x.ndim > 1 else x for name, x in unet_inputs(2).items()}
        assert error(outputs(model, one)[0], both[:1]) <= EXACT


def test_compiled_blocks_are_one_graph_each() -> None:
    torch.compiler.reset()
    graphs = Graphs()
    assert max(map(error, run("token-merging:0.5", compile=graphs)[0], run("token-merging:0.5")[0])) <= EXACT
    made = graphs.made
    torch.compiler.reset()
    plain = Graphs()
    run("interval:1000,first_blocks=0", compile=plain)
    assert made == plain.made > 0


def test_removed_it_is_as_it_was() -> None:
    model = unet()
    attributes = [sorted(vars(module)) for module in model.modules()]
    want = outputs(model, unet_inputs())[0]
    with parafuse.apply(model, parafuse.Config(cache="token-merging:0.5")) as handle:
        merging: Any = next(iter(handle.skipping.values()))
        with pytest.raises(RuntimeError):
            outputs(model, unet_inputs() | dict(encoder_hidden_states=torch.zeros(2, 5, 3)))
        assert all(site.grid is None for site in merging.sites)
        assert error(outputs(model, unet_inputs())[0], want) > 100 * EXACT
    assert torch.equal(outputs(model, unet_inputs())[0], want)
    assert attributes == [sorted(vars(module)) for module in model.modules()]


def test_a_unet_without_attention_at_the_top_is_refused() -> None:
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    refused = pytest.raises(UnsupportedError, match="made smaller by up to 1; ask for a larger max_downsample")
    with parafuse.apply(unet(**blocks), parafuse.Config(cache="token-merging:0.5")) as handle, refused:
        outputs(handle.target, unet_inputs())
    with parafuse.apply(unet(**blocks), parafuse.Config(cache="token-merging:0.5,max_downsample=2")) as handle:
        outputs(handle.target, unet_inputs())
