"""The rewrite `qkv`: one product for queries, keys and values where an attention has three.

Diffusers makes the joint projection (`fuse_projections`) and keeps the three beside it. Here the three are views of the
joint weight while it is on, so that no memory is taken twice, and what writes into one writes into the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.engine.rewrites.fusable import SOURCES, Trials, attentions, projections, why_not_plain
from parafuse.engine.rewrites.rewrite import Rewrite
from parafuse.errors import ConfigError
from parafuse.log import note
from parafuse.parallel.hooks import override

PROCESSORS = 132
"""Of an H100 or H200."""
TILE = (128, 256)
"""Rows and columns that one of them computes at a time, in 16 bits."""
MISSING: Any = object()
CHANGING = ("load_lora_adapter", "add_adapter", "load_attn_procs", "load_state_dict")
"""Methods of a denoiser that change its projections, or what stands on them: the joint ones are taken off before."""
STATE = frozenset(vars(nn.Module()))
"""What torch keeps in a module; of it only submodules are changed."""


class FusedProjections(Rewrite):
    """The joint projections of one denoiser. All ranks do the same with it; no communication.

    An attention on whose projections an adapter is loaded later runs as it was as long as that is there."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.found = attentions(module)
        self._trials = Trials()
        self._fused: dict[nn.Module, _Fused] = {}
        self._why_not: Counter[str] = Counter()
        self._left: dict[nn.Module, Any] = {}
        """Those without: their processor, and why their projections could not be read."""
        self._said: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._is_aside = False
        self.is_offloaded = False
        self.at_home: Callable[[], AbstractContextManager[None]] = nullcontext
        """Inside of it weights have their values, where they are offloaded."""

    def install(self) -> None:
        """Raises ConfigError where no attention can have one."""
        self._renew()
        if not self._fused and set(self._why_not) != {"it is fused already"}:
            reasons = "; ".join(f"{why} ({count})" for why, count in self._why_not.most_common(3))
            raise ConfigError(
                f"rewrites='qkv': {type(self.module).__name__} has no attention that can have one product for queries, "
                f"keys and values: {reasons or 'none has separate projections'}. "
                + ("fuse_lora() and unload_lora_weights() first, or leave" if "adapter" in reasons else "Leave")
                + " qkv out of rewrites."
            )
        self._undo.append(self.module.register_forward_pre_hook(lambda *_: self._before_call()).remove)
        for name in CHANGING:
            if callable(getattr(self.module, name, None)):
                self._undo.append(override(self.module, name, self._first_taken_off(getattr(self.module, name))))

    def remove(self) -> None:
        """Puts every projection and processor back as they were. Goes on where it was left."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._take_off()

    def lines(self) -> list[str]:
        """One line, for receipts."""
        left = len(self.found) - len(self._fused)
        reasons = "; ".join(f"{why} ({count})" for why, count in self._why_not.most_common(3))
        extra = self.extra_bytes()
        line = f"rewrite qkv: one product in {len(self._fused)} of {len(self.found)} attentions"
        line += f", {extra / 1e6:.1f} MB of weights twice" if extra else ""
        return [line + (f" ({reasons})" if left and reasons else "")]

    @property
    def num_on(self) -> int:
        """Attentions that have it now."""
        return len(self._fused)

    @property
    def why_not(self) -> dict[str, int]:
        """Why others have not -> how many."""
        return dict(self._why_not)

    def idle(self) -> set[nn.Module]:
        """Linears that no call uses while this is on: none is to be quantized or counted."""
        return {part for one in self._fused.values() for part in one.sources}

    def extra_bytes(self) -> int:
        """Of weights that are there twice: none, unless something has moved them since."""
        if self.is_offloaded:  # away they cannot be told; what shares memory comes as one (parallel/image.py)
            return 0
        return sum(one.extra_bytes() for one in self._fused.values())

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the model is as it was: to be saved, or changed."""
        before, self._is_aside = self._is_aside, True
        self._take_off()
        try:
            yield
        finally:
            self._is_aside = before
            if self._undo:
                self._renew()

    def _renew(self) -> None:
        """Puts it on every attention that can have it now."""
        if self._is_aside:
            return
        self._why_not.clear()
        self._left.clear()
        for name, attention in self.found:
            if attention in self._fused:
                continue
            why_not = "it is fused already" if getattr(attention, "fused_projections", False) else ""
            why_not = why_not or why_not_plain(attention)
            processor, why_not = (None, why_not) if why_not else self._trials(attention)
            if why_not:
                self._why_not[why_not] += 1
                self._left[attention] = _looks(attention)
                if self._undo and why_not not in self._said:
                    note(f"rewrites qkv: off {name}: {why_not}")
                self._said.add(why_not)
            else:
                self._fused[attention] = _Fused(attention, processor)

    def _before_call(self) -> None:
        """Takes it off what was changed since, and puts it on again where that is gone."""
        if self._is_aside or torch.compiler.is_compiling():  # the model was compiled as a whole, with this in it
            return
        is_placed = hasattr(self.module, "_hf_hook") or hasattr(self.module, "_diffusers_hook") or self.is_offloaded
        changed = [one for one in self._fused.values() if not one.holds() or not (is_placed or one.is_tied())]
        if not (changed or self._may_fit()):
            return
        with self.at_home():
            for one in changed:
                one.remove()
                del self._fused[one.attention]
            self._renew()

    def _may_fit(self) -> bool:
        """Whether one that could not have it is another by now."""
        return any(looks != _looks(attention) for attention, looks in self._left.items())

    def _first_taken_off(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*args: Any, **kwargs: Any) -> Any:
            with self.set_aside():
                return original(*args, **kwargs)

        return changing

    def _take_off(self) -> None:
        for attention in list(self._fused):
            self._fused[attention].remove()
            del self._fused[attention]


class _Fused:
    """One attention with its joint projections on."""

    def __init__(self, attention: Any, processor: Any):
        self.attention = attention
        before = _state(attention)
        was_training = attention.training
        weight = self._weight()
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):  # new layers draw their weights
            attention.fuse_projections()
        if processor is not attention.processor:
            attention.set_processor(processor)
        after = _state(attention)
        self._changes = [
            (kind, key, before.get((kind, key), MISSING), after.get((kind, key), MISSING))
            for kind, key in {**before, **after}
            if before.get((kind, key), MISSING) is not after.get((kind, key), MISSING)
        ]
        self._processor = attention.processor
        self._joint = {name: attention._modules[name] for name in SOURCES if name in attention._modules}
        self._projections = projections(attention)
        self.sources: list[Any] = []
        for name, joint in self._joint.items():
            joint.train(was_training)
            parts = [self._projections[source] for source in SOURCES[name]]
            joint.requires_grad_(parts[0].get_parameter("weight").requires_grad)
            self.sources += parts
        for joint, source in self._pairs():
            source.data = joint

    def _weight(self) -> Tensor:
        return self.attention.to_q.weight

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """(rows of a joint weight or bias, the projection's own that has the same values)."""
        for name, joint in self._joint.items():
            parts = [self._projections[source] for source in SOURCES[name]]
            for kind in ("weight", "bias"):
                whole, owns = getattr(joint, kind), [getattr(part, kind) for part in parts]
                if whole is None or type(whole.data) is not Tensor:
                    continue  # quantized since
                row = 0
                for own in owns:
                    yield whole.data[row : row + own.shape[0]], own
                    row += own.shape[0]

    def holds(self) -> bool:
        """Whether the attention is as it was left."""
        found = self.attention._modules
        return self.attention.processor is self._processor and all(
            found.get(name) is part for parts in (self._joint, self._projections) for name, part in parts.items()
        )

    def is_tied(self) -> bool:
        """Whether both forms have the same memory: not so where weights were moved or replaced one by one. Looks at
        weights alone, in some microseconds, since every call asks."""
        for name, joint in self._joint.items():
            whole = joint._parameters["weight"]
            if type(whole) is not nn.Parameter:
                continue  # quantized since
            place = whole.data_ptr()
            for source in SOURCES[name]:
                own = self._projections[source]._parameters["weight"]
                if type(own) is not nn.Parameter or own.data_ptr() != place:
                    return type(own) is not nn.Parameter
                place += own.nbytes
        return True

    def extra_bytes(self) -> int:
        return sum(joint.nbytes for joint, own in self._pairs() if joint.data_ptr() != own.data_ptr())

    @torch.no_grad()
    def remove(self) -> None:
        """The projections get memory of their own again, with the values that they have."""
        for joint, own in self._pairs():
            if type(own.data) is Tensor and joint.data_ptr() == own.data_ptr():
                own.data = own.data.clone()
        for kind, key, before, after in reversed(self._changes):
            holder = self.attention._modules if kind == "module" else vars(self.attention)
            if holder.get(key, MISSING) is not after:
                continue  # replaced by somebody since
            if before is MISSING:
                del holder[key]
            else:
                holder[key] = before


def gain(rows: int, width: int, processors: int = PROCESSORS) -> float:
    """Predicted: how much faster one product is than three, by the rounds of tiles that a GPU makes of each; nothing of
    what a CPU does. `rows`: tokens of one stream on one rank, times samples."""

    def rounds(columns: int) -> int:
        tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
        return math.ceil(tiles / processors)

    return 3 * rounds(width) / rounds(3 * width)


def why_not(module: nn.Module) -> str:
    """Why a denoiser cannot have it, as far as is known before it is tried."""
    return "" if attentions(module) else "has no attention with separate projections"


def why_not_auto(module: nn.Module) -> str:
    """Why `auto` leaves it off; empty where it pays."""
    weight = next(module.parameters(), None)
    if weight is None or not weight.is_cuda:
        return "does not pay on a CPU: one product takes as long as three there"
    return "" if attentions(module) else "has no attention with separate projections"


def _looks(attention: Any) -> tuple[Any, ...]:
    """What may change, so that it can have it."""
    return attention.processor, why_not_plain(attention), getattr(attention, "fused_projections", False)


def _state(module: nn.Module) -> dict[tuple[str, str], Any]:
    """What an attention has itself."""
    own = {("value", key): value for key, value in vars(module).items() if key not in STATE}
    return own | {("module", key): value for key, value in module._modules.items()}
