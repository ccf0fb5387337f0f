"""Regional compile under sequence parallel: what `block.compile(...)` means for a block that parafuse runs on several
ranks. The exchanges are operators, so each block is one graph, and blocks of a kind share it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from parafuse.errors import UnsupportedError
from parafuse.parallel.attention_mode import run_on_rows
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.effects import Parts
from parafuse.parallel.fingerprint import SCALES, fingerprint
from parafuse.parallel.hooks import Forward, OnForward, override, override_forward
from parafuse.parallel.tiers import Compiler, Tally, Tiers, own_code
from parafuse.parallel.traced import TracedBlocks
from parafuse.parallel.whole_shapes import WholeShapes

MAX_KINDS = 32
"""Of blocks, by what they are made of, whose graphs are kept."""


def call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A block in which nothing is split."""
    return forward(*args, **kwargs)


class CompiledKind:
    """The compiled forms of all blocks that are alike, with the same options of `torch.compile`."""

    way_out = ""

    def __init__(self, name: str, whole: WholeShapes | None, options: dict[str, Any]):
        self.name, self.options = name, options
        self._run_on_rows: Callable[..., Any] = torch.compile(own_code(run_on_rows, name), **options)
        self._call: Callable[..., Any] = torch.compile(own_code(call, name), **options)
        self._traced = TracedBlocks(name, whole, options) if whole is not None else None

    def run_on_rows(self, variant: Any, /, *args: Any) -> tuple[Any, int]:
        """`variant`: what a graph is made for beside its arguments, where that is known."""
        with torch.no_grad(), self._own_errors():  # the operators have no backward
            return self._run_on_rows(*args)

    def call(self, variant: Any, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        with self._own_errors():
            return self._call(forward, args, kwargs)

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
            told = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].partition("from user code:")[0]
            why = re.sub(r" at 0x[0-9a-f]+", "", " ".join(told.split()))
            raise UnsupportedError(f"{self.name}: cannot be compiled under parafuse: {why}{self.way_out}") from error


class RegionalKind(CompiledKind):
    """The same as `Config(compile=True)` has it: two graphs for a bucket of calls (tiers.py), counted."""

    way_out = (
        " (compile=True compiles every repeated block as one whole graph: leave it out for this model; offload whole "
        "blocks or components, not their parts)"
    )

    def __init__(self, name: str, whole: WholeShapes | None, tally: Tally):
        self.name = name
        self._rows, self._whole_calls = Tiers(run_on_rows, name, tally), Tiers(call, name, tally)
        options: dict[str, Any] = dict(fullgraph=True, dynamic=False, backend=Compiler(name, tally))
        self._traced = TracedBlocks(name, whole, options, tally) if whole is not None else None

    def run_on_rows(self, variant: Any, /, *args: Any) -> tuple[Any, int]:
        with torch.no_grad(), self._own_errors():
            return self._rows(variant, *args)

    def call(self, variant: Any, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        with self._own_errors():
            return self._whole_calls(variant, forward, args, kwargs)


class CompiledBlocks:
    """Which blocks are to run compiled, and how."""

    def __init__(self, whole: WholeShapes | None):
        self._whole = whole
        self._kinds: dict[str, list[CompiledKind]] = {}
        self._regional: dict[str, RegionalKind] = {}
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

    def compile_all(self, blocks: Iterable[nn.Module], tally: Tally) -> None:
        """What `Config(compile=True)` means for these blocks; again where they are made of something else by now (an
        adapter, other attention processors)."""
        for block in blocks:
            if block in self._asked and not isinstance(self._asked[block], RegionalKind):
                continue  # compiled by hand since
            kind = fingerprint(block, but=SCALES)
            if kind not in self._regional:
                if len(self._regional) >= MAX_KINDS:
                    self._regional.pop(next(iter(self._regional)))
                self._regional[kind] = RegionalKind(type(block).__name__, self._whole, tally)
            self._asked[block] = self._regional[kind]

    @property
    def num_compiled(self) -> Counter[str]:
        """Blocks by class."""
        return Counter(type(block).__name__ for block in self._asked)

    def forget(self) -> None:
        self._asked.clear()
        self._kinds.clear()
        self._regional.clear()


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
    """What `block.compile(...)` means where calls of blocks are met but not split (a cache on one rank), and what
    `Config(compile=True)` does there: the block's own forward is compiled, and blocks of a kind share it. Taken off
    with parafuse."""

    def __init__(self, units: list[nn.Module], variant: Callable[[nn.Module], Any] = lambda _: None):
        self.units, self._variant = units, variant
        self.compiled = CompiledBlocks(None)
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for unit in self.units:
            self._undo.append(override_forward(unit, lambda original, unit=unit: self._forward(unit, original)))
            self._undo.append(override(unit, "compile", self.compiled.compile_method(unit, fingerprint(unit))))

    def remove(self) -> None:
        """Puts both back as they were. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.compiled.forget()

    def _forward(self, unit: nn.Module, original: Forward) -> Forward:
        compiled, variant = self.compiled, self._variant

        def forward(*args: Any, **kwargs: Any) -> Any:
            kind = compiled.get(unit)
            if kind is None:
                return original(*args, **kwargs)
            return kind.call(variant(unit), original, *args, **kwargs)

        return forward


BY_BLOCKS = "its repeated blocks are compiled already (compile=True); leave that out to compile it as a whole."


class Regional(OnForward):
    """Compiles the repeated blocks of one denoiser: last of all that stands on it inside of its calls, and again where
    its parts were replaced since the last one. No communication."""

    def __init__(
        self, root: nn.Module, blocks: list[nn.Module], compiled: CompiledBlocks, options: dict[str, Any] | None = None
    ):
        """`options`: of Inductor, for every graph."""
        super().__init__(root)
        self.blocks, self.compiled, self.tally = blocks, compiled, Tally(options=options or {})
        self._parts = Parts(root)
        self._refusal: Callable[[], None] | None = None

    def install(self) -> None:
        super().install()
        if not is_refused(self.module):
            self._refusal = refuse_compile(self.module, BY_BLOCKS)
        self.compiled.compile_all(self.blocks, self.tally)

    def remove(self) -> None:
        """Puts back what stood there; what was compiled goes with the blocks. No communication."""
        super().remove()
        if self._refusal:
            self._refusal()
            self._refusal = None

    def _forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._parts.have_other_objects():
                self._parts = Parts(self.module)
                self.compiled.compile_all(self.blocks, self.tally)
            return original(*args, **kwargs)

        return forward


def refuse_compile(module: nn.Module, way_out: str = "") -> Callable[[], None]:
    """Makes `module.compile` say that its blocks are to be compiled; the returned function undoes it."""
    way_out = way_out or (
        "cannot be compiled as a whole under sequence parallel, a cache or the rewrite text; compile its blocks: "
        "compile_repeated_blocks(fullgraph=True), or compile() on each of them."
    )

    def refused(*_: Any, **__: Any) -> None:
        raise UnsupportedError(f"{type(module).__name__}: {way_out}")

    return override(module, "compile", refused)


def is_refused(module: nn.Module) -> bool:
    """Whether something stands for `module.compile` already."""
    return "compile" in vars(module)
