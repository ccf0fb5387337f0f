"""Writes how a model's tokens are split in the form of diffusers' own `_cp_plan`, where that form can say it.

The form names inputs of modules that are cut into equal contiguous parts, and modules whose outputs are put together
again. It is taken for the whole model, if the model leaves tokens apart outside of attention, else for its blocks.
Which attention calls exchange is decided by the model's attention processors, not by the form, so that is looked up.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from parafuse.engine.derive import Failures
from parafuse.engine.probe import owned, probe
from parafuse.engine.stack import block_stack
from parafuse.errors import UnsupportedError
from parafuse.parallel.attention_mode import AttentionMode
from parafuse.parallel.block_plan import BlockPlan, TokenDim

CONFIG = "_parallel_config"
"""Attribute of diffusers' attention processors; those that pass it on to attention exchange there."""


@dataclass(frozen=True)
class Cut:
    """`ContextParallelInput(split_dim, expected_dims)`."""

    split_dim: int
    expected_dims: int

    def source(self) -> str:
        return f"ContextParallelInput(split_dim={self.split_dim}, expected_dims={self.expected_dims})"


@dataclass(frozen=True)
class Join:
    """`ContextParallelOutput(gather_dim, expected_dims)`."""

    gather_dim: int
    expected_dims: int

    def source(self) -> str:
        return f"ContextParallelOutput(gather_dim={self.gather_dim}, expected_dims={self.expected_dims})"


@dataclass
class ExportedPlan:
    """Module name -> what is cut of its inputs, and module name -> how its outputs are joined."""

    model: str
    inputs: dict[str, dict[str, Cut | list[Cut]]] = field(default_factory=dict[str, dict[str, "Cut | list[Cut]"]])
    outputs: dict[str, list[Join]] = field(default_factory=dict[str, list[Join]])

    def as_diffusers(self) -> dict[str, Any]:
        """The objects that `enable_parallelism(cp_plan=...)` takes."""
        from diffusers.models import _modeling_parallel

        names = {
            "ContextParallelInput": _modeling_parallel.ContextParallelInput,
            "ContextParallelOutput": _modeling_parallel.ContextParallelOutput,
        }
        found: dict[str, Any] = eval(self.literal(), names)
        return found

    def literal(self) -> str:
        """The plan as a Python expression."""
        lines: list[str] = []
        for module, arguments in self.inputs.items():
            lines.append(f"    {json.dumps(module)}: {{")
            for name, cut in arguments.items():
                shown = f"[{', '.join(c.source() for c in cut)}]" if isinstance(cut, list) else cut.source()
                lines.append(f"        {json.dumps(name)}: {shown},")
            lines.append("    },")
        for module, joins in self.outputs.items():
            shown = joins[0].source() if len(joins) == 1 else f"[{', '.join(j.source() for j in joins)}]"
            lines.append(f"    {json.dumps(module)}: {shown},")
        return "\n".join(["{", *lines, "}"])

    def source(self) -> str:
        """The plan as a Python module that defines `_cp_plan`."""
        return (
            f'"""Context parallel plan of {self.model} for diffusers, derived by parafuse.\n\n'
            "    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2), cp_plan=_cp_plan)\n\n"
            'Lengths and heads must divide by the number of ranks, or ulysses_anything=True be set."""\n\n'
            "from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput\n\n"
            f"_cp_plan = {self.literal()}\n"
        )


def export_plan(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedPlan:
    """The plan of `model`, from one real call of it. Local; about 50 forwards.

    Raises UnsupportedError, with the reason, where the form cannot say how the tokens are split."""
    reasons: list[str] = []
    for attempt in (_whole_model, _by_blocks):
        try:
            return attempt(model, args, kwargs)
        except Failures as error:
            reasons.append(str(error).partition("\n")[0].rstrip(".") or type(error).__name__)
    raise UnsupportedError(
        f"{type(model).__name__}: diffusers' form cannot say how its tokens are split: as a whole, {reasons[0]}; by "
        f"blocks, {reasons[1]}. Use parafuse itself."
    )


# --- the whole model ----------------------------------------------------------------------------------------------


def _whole_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedPlan:
    leaves, spec = tree_flatten((args, kwargs))
    plan = _probed(model, leaves, spec)
    _check_attention(model, plan, leaves, spec)
    exported = ExportedPlan(type(model).__name__, {"": _cuts(model, plan.arguments, leaves, spec)})
    name, joins = _last_module(model, plan, leaves, spec)
    exported.outputs[name] = joins
    return exported


def _last_module(model: nn.Module, plan: BlockPlan, leaves: list[Any], spec: TreeSpec) -> tuple[str, list[Join]]:
    """The submodule whose output is the model's only result."""
    made: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda _module, _args, out: made.append((name, out)) if isinstance(out, Tensor) else None

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        args, kwargs = tree_unflatten([owned(x) for x in leaves], spec)
        with torch.no_grad():
            results = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, out in made if len(results) == 1 and _same_tensor(out, results[0])]
    if not names or list(plan.results) != [0]:
        raise UnsupportedError("its result is not the output of one of its modules")
    return min(names, key=lambda name: name.count(".")), [Join(plan.results[0].dim, results[0].ndim)]


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same values in the same places, not views of each other."""
    places = [(x.data_ptr(), x.shape, x.stride()) for x in (one, other)]
    return places[0] == places[1]


# --- block by block -----------------------------------------------------------------------------------------------


@dataclass
class _BlockCall:
    name: str
    block: nn.Module
    leaves: list[Any]
    spec: TreeSpec
    ids: list[int]
    results: list[Any]


def _by_blocks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedPlan:
    calls = _block_calls(model, args, kwargs)
    if not calls:
        raise UnsupportedError("its blocks are not called")
    exported = ExportedPlan(type(model).__name__)
    came_whole: dict[int, int] = {}
    split: dict[int, TokenDim] = {}
    """Token dims of the results of the last block, by the tensors' identity."""
    for number, call in enumerate(calls):
        plan = _probed(call.block, call.leaves, call.spec)
        _check_attention(call.block, plan, call.leaves, call.spec)
        arguments = plan.arguments
        arrives_split = {i for i in arguments if call.ids[i] in split}
        if number and not arrives_split:  # other code joins two stacks: whole in between
            _join(exported, calls[number - 1], split)
        elif number and len(arrives_split) != len(split):
            raise UnsupportedError(f"{call.name} takes only some of what {calls[number - 1].name} gives")
        new = {i: label for i, label in arguments.items() if i not in arrives_split}
        fixed = {i for i in new if came_whole.get(call.ids[i], number) != number}
        listed = call.name.rpartition(".")[0] + ".*"
        cuts = _cuts(call.block, new, call.leaves, call.spec)
        constant = _names_of(call.block, fixed, call.leaves, call.spec)
        for name, cut in cuts.items():
            module = listed if name in constant else call.name
            earlier = exported.inputs.get(listed, {})
            if name in earlier and earlier[name] != cut:
                raise UnsupportedError(f"{listed} does not take {name!r} alike in all blocks")
            if name not in earlier:
                exported.inputs.setdefault(module, {})[name] = cut
        for i in new:
            came_whole.setdefault(call.ids[i], number)
        split = {id(call.results[i]): label for i, label in plan.results.items()}
    _join(exported, calls[-1], split)
    _merge_constants(exported)
    return exported


def _merge_constants(exported: ExportedPlan) -> None:
    """An input that every block of a list cuts stands once, under `list.*`: not also under the first block."""
    for module, cuts in list(exported.inputs.items()):
        listed = module.rpartition(".")[0] + ".*"
        if module != listed:
            for name in [n for n, cut in cuts.items() if exported.inputs.get(listed, {}).get(n) == cut]:
                del cuts[name]
            if not cuts:
                del exported.inputs[module]


def _join(exported: ExportedPlan, call: _BlockCall, split: dict[int, TokenDim]) -> None:
    """Puts together what `call` gave."""
    results = [x for x in call.results if isinstance(x, Tensor)]
    if len(results) != len(call.results) or any(id(x) not in split for x in results):
        raise UnsupportedError(f"{call.name} gives more than token tensors")
    exported.outputs[call.name] = [Join(split[id(x)].dim, x.ndim) for x in results]


def _block_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_BlockCall]:
    """Every call of a block in one forward, with copies of its arguments and the identities of the originals."""
    calls: list[_BlockCall] = []
    kept: list[Any] = []  # alive, so that no identity is used twice
    names = {id(module): name for name, module in model.named_modules()}

    def before(block: nn.Module, block_args: Any, block_kwargs: Any) -> None:
        leaves, spec = tree_flatten((block_args, block_kwargs))
        kept.extend(leaves)
        ids = [id(leaf) for leaf in leaves]
        calls.append(_BlockCall(names[id(block)], block, [owned(leaf) for leaf in leaves], spec, ids, []))

    def after(_block: nn.Module, _args: Any, result: Any) -> None:
        calls[-1].results = tree_leaves(result)

    handles = [h for block in block_stack(model) for h in (
        block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after))]  # fmt: skip
    try:
        args, kwargs = tree_map(owned, (args, kwargs))
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if len({call.name for call in calls}) != len(calls):
        raise UnsupportedError("a block is called twice")
    return calls


# --- what both have in common ----------------------------------------------------------------------------------------


def _probed(module: nn.Module, leaves: list[Any], spec: TreeSpec) -> BlockPlan:
    plan = probe(module, module.forward, leaves, spec)
    if not plan.splits:
        raise UnsupportedError("nothing attends to itself")
    return plan


def _names_of(module: nn.Module, numbers: set[int], leaves: list[Any], spec: TreeSpec) -> set[str]:
    return {_parameter(module, i, leaves, spec)[0] for i in numbers}


def _parameter(module: nn.Module, number: int, leaves: list[Any], spec: TreeSpec) -> tuple[str, int, int]:
    """(name of the parameter that holds leaf `number`, its place in it, leaves in it)."""
    args, kwargs = tree_unflatten(list(range(len(leaves))), spec)
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    for name, value in [*zip(parameters, args, strict=False), *kwargs.items()]:
        inside = tree_leaves(value)
        if number in inside:
            if inside != [value] and list(value) != inside:
                raise UnsupportedError(f"{name!r} is a nest of tensors")
            return name, inside.index(number), 0 if inside == [value] else len(inside)
    raise UnsupportedError(f"argument {number} has no name")


def _cuts(
    module: nn.Module, arguments: dict[int, TokenDim], leaves: list[Any], spec: TreeSpec
) -> dict[str, Cut | list[Cut]]:
    """The arguments by name; those in a tuple as a list, of which the form wants every element."""
    found: dict[str, Cut | list[Cut]] = {}
    tuples: dict[str, dict[int, Cut]] = {}
    sizes: dict[str, int] = {}
    for number, label in arguments.items():
        name, place, size = _parameter(module, number, leaves, spec)
        if len(label.atoms) != 1:
            raise UnsupportedError(f"{name!r} holds rows of two streams, of which each is cut by itself")
        cut = Cut(label.dim, leaves[number].ndim)
        if size == 0:
            found[name] = cut
        else:
            tuples.setdefault(name, {})[place] = cut
            sizes[name] = size
    for name, cuts in tuples.items():
        if len(cuts) != sizes[name]:
            raise UnsupportedError(f"of {name!r}, only some tensors are cut")
        found[name] = [cuts[place] for place in range(sizes[name])]
    return found


def _check_attention(module: nn.Module, plan: BlockPlan, leaves: list[Any], spec: TreeSpec) -> None:
    """Refuses attention that diffusers would not exchange, or whose mask it would not cut.

    Where it exchanges keys that every rank has (cross-attention to text), each key enters as often as there are ranks,
    which changes nothing but the cost."""
    exchanging = _exchanging_sites(module, leaves, spec)
    masked = _masked_sites(module, leaves, spec)
    for number, site in enumerate(plan.sites):
        if site.keys is not None and number not in exchanging:
            raise UnsupportedError(f"its processor does not exchange at attention {number}")
    if exchanging & masked:
        raise UnsupportedError(f"attention {min(exchanging & masked)} has a mask")


class _Exchanges(Exception):
    """Raised by the stand-in for a parallel configuration when attention looks into it."""


class _StandIn:
    """Takes the place of a processor's parallel configuration; whoever asks it anything would exchange."""

    def __getattr__(self, name: str) -> Any:
        raise _Exchanges


def _exchanging_sites(module: nn.Module, leaves: list[Any], spec: TreeSpec) -> set[int]:
    """Numbers of the attention calls of `module` at which diffusers' context parallel would exchange."""
    found: set[int] = set()
    for attention in module.modules():
        processor = getattr(attention, "processor", None)
        if processor is None or not hasattr(processor, CONFIG):
            continue
        calls: list[int] = []

        def attend(site: int, *rest: Any, calls: list[int] = calls) -> Tensor:
            calls.append(site)
            return torch.nn.functional.scaled_dot_product_attention(**rest[-1])

        args, kwargs = tree_unflatten([owned(x) for x in leaves], spec)
        with torch.no_grad(), AttentionMode(attend), _configured(processor):
            try:
                module(*args, **kwargs)
            except _Exchanges:
                found.add(len(calls))
            except ValueError as error:  # it looked for a configuration, and diffusers exchanges no such attention
                raise UnsupportedError(f"diffusers refuses attention {len(calls)} ({error})") from error
    return found


@contextmanager
def _configured(processor: Any) -> Iterator[None]:
    """The stand-in on one processor instance."""
    had = CONFIG in vars(processor)
    before = getattr(processor, CONFIG)
    setattr(processor, CONFIG, _StandIn())
    try:
        yield
    finally:
        if had:
            setattr(processor, CONFIG, before)
        else:
            delattr(processor, CONFIG)


def _masked_sites(module: nn.Module, leaves: list[Any], spec: TreeSpec) -> set[int]:
    masked: set[int] = set()

    def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Any, given: dict[str, Any]) -> Tensor:
        if call.mask is not None:
            masked.add(site)
        return torch.nn.functional.scaled_dot_product_attention(**given)

    args, kwargs = tree_unflatten([owned(x) for x in leaves], spec)
    with torch.no_grad(), AttentionMode(attend):
        module(*args, **kwargs)
    return masked
