"""How a block is run on split tokens: on its rows alone where the probe proves that, else on whole shapes.

On whole shapes a block runs on `Sharded` tensors: any function that has no rule gathers, so which arguments are split
decides what is saved, never what is right. They are therefore chosen by their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from parafuse.engine.plan_store import key_of, load_plan, save_plan
from parafuse.engine.probe import owned, probe, prove
from parafuse.errors import UnsupportedError, is_out_of_memory
from parafuse.log import note
from parafuse.parallel.block_plan import BlockPlan, TokenDim
from parafuse.parallel.held import Held
from parafuse.parallel.hooks import Forward

Failures = (UnsupportedError, RuntimeError, ValueError, IndexError, TypeError)


def derive(
    block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, plan: BlockPlan | None = None
) -> BlockPlan:
    """The plan of a block for arguments of this structure. Local: no communication, the same on every rank.

    `plan`: one from other sizes. It is held against the serial run again, since small sizes can hide what a block does
    with its length (a number that says how many tokens are special, say), and kept if it holds.

    An error of the block itself (wrong arguments, say) is raised as plain torch would raise it. What the block changes
    in itself when it is called (a count of calls, say) is put back, but for values of tensors."""
    held = Held(block)
    try:
        return _derived(block, forward, leaves, spec, plan)
    finally:
        held.restore()


def _derived(
    block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, plan: BlockPlan | None
) -> BlockPlan:
    try:
        if plan is not None:
            prove(plan, block, forward, leaves, spec)
            return plan
        plan = _kept_or_probed(block, forward, leaves, spec)
    except Failures as failure:
        if is_out_of_memory(failure):  # of this rank alone: the others would take another way
            raise
        return on_whole_shapes(
            type(block).__name__, forward, leaves, spec, str(failure).partition("\n")[0] or type(failure).__name__
        )
    return (
        plan
        if plan.sites
        else on_whole_shapes(type(block).__name__, forward, leaves, spec, "no attention of torch's was seen")
    )


def _kept_or_probed(block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> BlockPlan:
    key = key_of(block, leaves, spec)
    kept = load_plan(key)
    if kept is not None:
        try:
            prove(kept, block, forward, leaves, spec)
            return kept
        except Exception as failure:  # whatever a file may hold
            if is_out_of_memory(failure):
                raise
    plan = probe(block, forward, leaves, spec)
    if plan.splits:  # what must run on whole shapes at these sizes may not have to at others
        save_plan(key, type(block).__name__, plan)
    return plan


def on_whole_shapes(name: str, forward: Forward, leaves: list[Any], spec: TreeSpec, why: str) -> BlockPlan:
    """Splits every argument that comes back in its own shape: the streams of a block."""
    args, kwargs = tree_unflatten([owned(leaf) for leaf in leaves], spec)
    with torch.no_grad():
        results = tree_leaves(forward(*args, **kwargs))
    arguments: dict[int, TokenDim] = {}
    labels: dict[int, TokenDim] = {}
    for number, result in enumerate(results):
        if not _is_stream(result):
            continue
        label = TokenDim(_token_dim(result), ())
        same = [i for i, x in enumerate(leaves) if _is_stream(x) and x.shape == result.shape and i not in arguments]
        if same:
            arguments[same[0]] = labels[number] = label
    if not arguments:
        streams = [i for i, x in enumerate(leaves) if _is_stream(x)]
        largest = max(streams, key=lambda i: leaves[i].numel(), default=None)
        if largest is not None:
            arguments[largest] = TokenDim(_token_dim(leaves[largest]), ())
    note(f"{name}: runs on whole shapes, exchanging more ({why})")
    return BlockPlan(arguments, (), labels, why_not_local=why)


def _is_stream(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2 and x.numel() > 0


def _token_dim(x: Tensor) -> int:
    """The longest dim between the first and the last; the first where there is none, or none above 1."""
    middle = range(1, x.ndim - 1)
    longest = max(middle, key=lambda d: x.shape[d], default=0)
    return longest if x.shape[longest] > 1 else 0
