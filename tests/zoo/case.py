"""One configuration of a diffusers transformer, small enough for a test: data, with where its values come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.models import ODD, Inputs, Sizes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A class that diffusers exports, a tiny configuration of it, and the inputs of one call."""

    name: str
    """Name of the class; a second configuration of it says after a colon what differs, as `Wan...: image to video`."""
    config: Mapping[str, Any]
    """Keywords of the constructor."""
    inputs: Callable[[Sizes], Inputs]
    """Sizes -> keywords of `forward`, from torch's global generator. Image tokens: `sizes.grid` of frames, rows and
    columns *after* patching (a model without frames takes frames * rows as rows). Where the model takes a key mask of
    the text, the last sample's text has holes."""
    source: str
    """Where the values come from: diffusers' tests, a docstring, or the published configuration scaled down."""
    rounding: str = ""
    """Where the model rounds to 16 bits although its weights are fp32: there a difference in the last place can flip a
    rounding, so that no more than 1e-3 can be asked of it."""
    sizes: Sizes = ODD
    """The lengths that a comparison starts from; others only where the class cannot do these."""

    def build(self) -> nn.Module:
        """The model in eval mode, with the weights that its constructor gives."""
        import diffusers

        return getattr(diffusers, self.name.split(":")[0])(**self.config).eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Prepared(Case):
    """A model that its pipeline changes before the first call."""

    prepare: Callable[[Any], None]

    def build(self) -> nn.Module:
        model = super().build()
        self.prepare(model)
        return model.eval().requires_grad_(False)
