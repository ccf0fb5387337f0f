"""What the probe finds out about the blocks of real models, whatever the lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.engine.probe import probe
from parafuse.engine.stack import block_stack
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.hooks import override_forward
from parafuse.parallel.shard import Sharded
from tests.models import EQUAL, FAMILIES, ODD, TINY, Sizes, build, call, inputs

Readable = tuple[dict[str, str], list[str], dict[int, str]]
"""Arguments and results as "dim:atoms", attention as "queries-keys"; atoms are letters in the order of the queries."""

SIZES = {
    "odd": ODD,
    "text as long as image": EQUAL,
    "few tokens": TINY,
    "two and two": Sizes(grid=(1, 1, 2), text=2),
    "as many tokens as batch": Sizes(grid=(1, 1, 3), text=3, batch=3),
    "as many tokens as features": Sizes(grid=(1, 4, 6), text=24),
    "as many tokens as features of flux": Sizes(grid=(1, 6, 8), text=48),
    "batch 1": Sizes(batch=1),
}
_FLUX = ({"hidden_states": "1:b", "encoder_hidden_states": "1:a", "image_rotary_emb.0": "0:ab",
          "image_rotary_emb.1": "0:ab"}, ["ab-ab"], {0: "1:a", 1: "1:b"})  # fmt: skip
_WAN = ({"hidden_states": "1:a", "rotary_emb.0": "1:a", "rotary_emb.1": "1:a"}, ["a-a", "a-"], {0: "1:a"})
_WEAVER = ({"strands": "1:a", "spins.0": "0:a", "spins.1": "0:a"}, ["a-a"], {0: "1:a"})
EXPECTED: dict[str, dict[str, list[Readable]]] = {
    "flux": {"FluxTransformerBlock": [_FLUX], "FluxSingleTransformerBlock": [_FLUX]},
    "flux2": {
        "Flux2TransformerBlock": [_FLUX],
        "Flux2SingleTransformerBlock": [
            ({"hidden_states": "1:a", "image_rotary_emb.0": "0:a", "image_rotary_emb.1": "0:a"}, ["a-a"], {0: "1:a"})
        ],
    },
    "sd3": {
        "JointTransformerBlock": [
            ({"hidden_states": "1:a", "encoder_hidden_states": "1:b"}, ["ab-ab", "a-a"], {0: "1:b", 1: "1:a"}),
            ({"hidden_states": "1:a", "encoder_hidden_states": "1:b"}, ["ab-ab"], {0: "1:b", 1: "1:a"}),
            ({"hidden_states": "1:a", "encoder_hidden_states": "1:b"}, ["ab-ab"], {1: "1:a"}),
        ]
    },
    "wan": {"WanTransformerBlock": [_WAN]},
    "wan_ti2v": {"WanTransformerBlock": [(_WAN[0] | {"temb": "1:a"}, *_WAN[1:])]},
    "weaver": {"Weave": [_WEAVER]},
    "weaver_gqa": {"Weave": [_WEAVER]},
}


def argument_names(block: nn.Module, spec: TreeSpec) -> list[str]:
    """The name of every leaf, as the block's own forward calls it."""
    args, kwargs = tree_unflatten(list(range(spec.num_leaves)), spec)
    given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    names: dict[int, str] = {}
    for name, value in list(given.items())[1:]:
        for key, tree in value.items() if name == "kwargs" else [(name, value)]:
            leaves = tree_flatten(tree)[0]
            names |= {leaf: key if leaves == [tree] else f"{key}.{i}" for i, leaf in enumerate(leaves)}
    return [names[i] for i in range(spec.num_leaves)]


def readable(plan: BlockPlan, names: list[str]) -> Readable:
    letters: dict[int, str] = {}

    def text(atoms: tuple[int, ...] | None) -> str:
        return "".join(letters.setdefault(atom, "abcdef"[len(letters)]) for atom in atoms or ())

    sites = [f"{text(site.queries)}-{text(site.keys)}" for site in plan.sites]
    arguments = {names[i]: f"{label.dim}:{text(label.atoms)}" for i, label in plan.arguments.items()}
    return arguments, sites, {i: f"{label.dim}:{text(label.atoms)}" for i, label in plan.results.items()}


def examine(family: str, sizes: Sizes) -> dict[str, list[Readable]]:
    """What the probe finds at every block of one call, each finding once."""
    model = build(family)
    found: dict[str, list[Readable]] = {}

    def watch(block: nn.Module) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                leaves, spec = tree_flatten((args, kwargs))
                plan = readable(probe(block, original, leaves, spec), argument_names(block, spec))
                if plan not in found.setdefault(type(block).__name__, []):
                    found[type(block).__name__].append(plan)
                return original(*args, **kwargs)

            return forward

        return make

    for block in block_stack(model):
        override_forward(block, watch(block))
    call(model, inputs(family, sizes))
    return found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_each_family(family: str, sizes: Sizes) -> None:
    assert examine(family, sizes) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_the_models_reaches_every_other(family: str) -> None:
    """Else a wrong split could not show in the output of the models that all tests use."""
    model, values = build(family), inputs(family, ODD)
    plain = call(model, values)
    name = "cloth" if "cloth" in values else "hidden_states"
    tokens_last = values[name].ndim > 3  # pictures: rows and columns at the end
    changed = values[name].clone()
    corner = (..., slice(-2, None), slice(-2, None)) if tokens_last else (slice(None), -1)
    changed[corner] += 1
    moved = (call(model, values | {name: changed}) - plain).abs()
    first = moved[..., :2, :2] if tokens_last else moved[:, 0]
    assert float(first.max() / plain.abs().max()) > 1e-3


def leaves_of(*args: Any, **kwargs: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten((args, kwargs))


class Attention(nn.Module):
    """Self-attention with a residual; `mix` may do anything to what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2)


def test_masks_are_not_tokens() -> None:
    """A key mask has a dim as long as the tokens; it stays whole."""
    block = Attention()
    x, mask = torch.randn(2, 35, 8), torch.rand(2, 1, 1, 35) < 0.5
    plan = probe(block, block.forward, *leaves_of(x, keep=mask))
    assert list(plan.arguments) == [0]
    assert plan.splits


def test_a_block_without_attention_is_not_split() -> None:
    block = nn.Linear(8, 8)
    plan = probe(block, block.forward, *leaves_of(torch.randn(2, 35, 8)))
    assert plan == BlockPlan()
    assert not plan.splits


def test_the_probe_changes_nothing() -> None:
    block = Attention()
    x, state = torch.randn(2, 35, 8), torch.get_rng_state()
    before = x.clone(), {name: value.clone() for name, value in block.state_dict().items()}
    first = probe(block, block.forward, *leaves_of(x))
    assert probe(block, block.forward, *leaves_of(x)) == first
    assert torch.equal(x, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in block.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_that_are_split_already_are_not_examined() -> None:
    block = Attention()
    with pytest.raises(TypeError, match="whole tensors"):
        probe(block, block.forward, *leaves_of(Sharded(*_part())))


def _part() -> tuple[Any, ...]:
    from parafuse.parallel.layout import Layout
    from parafuse.parallel.shard import SequenceGroup

    return torch.randn(2, 18, 8), 1, Layout((35,), 2), SequenceGroup(2, 0, None)
