"""Every transformer class of diffusers under sequence parallel gives what it gives alone, or is refused by name."""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests.support.cells import GIVEN, cell_of
from tests.zoo.collect import cases

REFUSED = {
    "Kandinsky6SRTransformer3DModel": "flex_attention",
    "SanaWMTransformer3DModel": "none of its blocks can be split",
}
"""Case -> a part of the refusal."""


@pytest.mark.parametrize("name", [name for name in cases() if ":" not in name])  # `make support-ci` has the others
def test_a_class_is_exact_or_refused(name: str) -> None:
    cell = cell_of(name, "Ulysses 3", lengths=(GIVEN,), bf16=False)
    assert cell.faults == []
    if name in REFUSED:
        assert REFUSED[name] in cell.refused[GIVEN]
    else:
        assert cell.is_exact, cell.refused


def test_every_exported_transformer_has_a_case() -> None:
    exported = {
        name
        for name in dir(diffusers)
        if "Transformer" in name
        and isinstance(getattr(diffusers, name), type)
        and issubclass(getattr(diffusers, name), (diffusers.ModelMixin, torch.nn.Module))
    }
    assert exported <= {name.partition(":")[0] for name in cases()}
    assert len(exported) >= 69
