"""Which weights of a component come together: all of it, its repeated blocks, or its single layers."""

from __future__ import annotations

from torch import Tensor, nn

from parafuse.engine.stack import named_blocks, repeated_blocks
from parafuse.errors import UnsupportedError
from parafuse.offload import GroupOffload, ModelOffload, Offload
from parafuse.parallel.image import carriers, sharing
from parafuse.parallel.residence import Group

LAYERS = (
    nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase, nn.MultiheadAttention,
)  # fmt: skip
"""Modules whose weights are read in their own calls alone. Weights of others (a table on a block, the norms that a
library computes by a function) stay while the component runs."""


def blocks_of(module: nn.Module, *, is_denoiser: bool) -> list[nn.Module]:
    """The blocks of a component, as far as it has any."""
    if not is_denoiser:
        return list(named_blocks(module).values())
    try:
        return repeated_blocks(module)
    except UnsupportedError:
        return []


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers that can come by themselves."""
    found: list[nn.Module] = []
    for part in module.modules():
        is_inside = any(
            part is inner for one in found if isinstance(one, nn.MultiheadAttention) for inner in one.modules()
        )
        if isinstance(part, LAYERS) and not is_inside:
            found.append(part)
    return found


def modules_of(module: nn.Module, method: Offload, *, is_denoiser: bool, is_decoder: bool) -> list[nn.Module]:
    """Whose calls weights come for; none: all come together."""
    if isinstance(method, ModelOffload):
        return []
    if method.is_fine:
        return layers_of(module)
    if isinstance(method, GroupOffload) and not is_decoder:
        return blocks_of(module, is_denoiser=is_denoiser)
    return []


def groups_of(module: nn.Module, modules: list[nn.Module]) -> list[Group]:
    """The groups of a component: first what stays. Weights that several groups share, or that share memory with those
    of another, stay too."""
    owner: dict[int, int] = {}
    several: set[int] = set()
    for number, one in enumerate(modules):
        for weight in one.parameters():
            if owner.setdefault(id(weight), number) != number:
                several.add(id(weight))
    weights = {id(x): x for x in module.parameters()}
    of = {id(x): key for key, weight in weights.items() for x in carriers(weight)}
    for members in sharing([x for weight in weights.values() for x in carriers(weight) if x.numel()]):
        keys = {of[id(x)] for x in members}
        if len({owner.get(key, -1) for key in keys}) > 1:
            several |= keys
    stays: list[Tensor] = [x for key, x in weights.items() if key not in owner or key in several]
    groups = [Group(stays)]
    for number, one in enumerate(modules):
        own = {id(x): x for x in one.parameters() if owner[id(x)] == number and id(x) not in several}
        groups.append(Group(list(own.values()), one))
    return groups
