"""Regional compile under sequence parallel: what `block.compile(...)` means for a block that parafuse runs on several
ranks. The exchanges are operators, so each block is one graph, and blocks of a kind share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from parafuse.errors import UnsupportedError
from parafuse.parallel.attention_mode import run_on_rows
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.fingerprint import fingerprint
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.traced import TracedBlocks
from parafuse.parallel.whole_shapes import WholeShapes


def call(forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """A block in which nothing is split."""
    return forward(*args, **kwargs)


class CompiledKind:
    """The compiled forms of all blocks that are alike, with the same options of `torch.compile`."""

    def __init__(self, name: str, whole: WholeShapes | None, options: dict[str, Any]):
        self.name, self.options = name, options
        self._run_on_rows = torch.compile(_own_code(run_on_rows, name), **options)
        self._call = torch.compile(_own_code(call, name), **options)
        self._traced = TracedBlocks(name, whole, options) if whole is not None else None

    def run_on_rows(self, *args: Any) -> tuple[Any, int]:
        with torch.no_grad(), self._own_errors():  # the operators have no backward
            return self._run_on_rows(*args)

    def call(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        with self._own_errors():
            return self._call(forward, *args, **kwargs)

    def on_whole_shapes(
        self, block: nn.Module, plan: BlockPlan, forward: Forward, leaves: list[Any], spec: TreeSpec
    ) -> Any:
        if self._traced is None:
            raise RuntimeError(f"{self.name}: nothing is split here")
        with self._own_errors():
            return self._traced(block, plan, forward, leaves, spec)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What torch cannot compile is our error, as it is where a block is refused uncompiled."""
        try:
            yield
        except RuntimeError as error:
            if not type(error).__module__.startswith("torch._dynamo"):
                raise
            why = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
            raise UnsupportedError(f"{self.name}: cannot be compiled under parafuse: {why}") from error


class CompiledBlocks:
    """Which blocks are to run compiled, and how."""

    def __init__(self, whole: WholeShapes | None):
        self._whole = whole
        self._kinds: dict[str, list[CompiledKind]] = {}
        self._asked: dict[nn.Module, CompiledKind] = {}

    def get(self, block: nn.Module) -> CompiledKind | None:
        return self._asked.get(block)

    def compile_method(self, block: nn.Module, kind: str) -> Callable[..., None]:
        """What stands for `block.compile`. `kind`: equal for blocks that may share graphs."""

        def compile(**options: Any) -> None:
            """As torch.nn.Module.compile, for the block's work on this rank; taken off with parafuse."""
            known = self._kinds.setdefault(kind, [])
            found = next((one for one in known if one.options == options), None)
            if found is None:
                found = CompiledKind(type(block).__name__, self._whole, options)
                known.append(found)
            self._asked[block] = found

        return compile

    def forget(self) -> None:
        self._asked.clear()
        self._kinds.clear()


class CompiledWhole:
    """What `module.compile(...)` means where whole calls are shared (guidance and data parallel): the module's own
    forward is compiled, inside of what shares its calls. Taken off with parafuse."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._compiled: Forward | None = None
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        self._undo.append(override_forward(self.module, self._forward))
        self._undo.append(override(self.module, "compile", self._compile))

    def remove(self) -> None:
        """Puts both back as they were. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _forward(self, original: Forward) -> Forward:
        self._original = original

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (self._compiled or original)(*args, **kwargs)

        return forward

    def _compile(self, *args: Any, **options: Any) -> None:
        self._compiled = torch.compile(self._original, *args, **options)


class CompiledUnits:
    """What `block.compile(...)` means where calls of blocks are met but not split (a cache on one rank): the block's
    own forward is compiled, and blocks of a kind share it. Taken off with parafuse."""

    def __init__(self, units: list[nn.Module]):
        self.units = units
        self._blocks = CompiledBlocks(None)
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for unit in self.units:
            self._undo.append(override_forward(unit, lambda original, unit=unit: self._forward(unit, original)))
            self._undo.append(override(unit, "compile", self._blocks.compile_method(unit, fingerprint(unit))))

    def remove(self) -> None:
        """Puts both back as they were. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._blocks.forget()

    def _forward(self, unit: nn.Module, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            compiled = self._blocks.get(unit)
            return original(*args, **kwargs) if compiled is None else compiled.call(original, *args, **kwargs)

        return forward


def refuse_compile(module: nn.Module) -> Callable[[], None]:
    """Makes `module.compile` say that its blocks are to be compiled; the returned function undoes it."""

    def refused(*_: Any, **__: Any) -> None:
        raise UnsupportedError(
            f"{type(module).__name__}: cannot be compiled as a whole under sequence parallel, a cache or the rewrite "
            "text; compile its blocks: compile_repeated_blocks(fullgraph=True), or compile() on each of them."
        )

    return override(module, "compile", refused)


def _own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy with a code object of its own: torch counts graphs, and gives up, by code object."""
    code = function.__code__.replace(co_name=f"{name}.{function.__name__}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
