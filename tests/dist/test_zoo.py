"""Every transformer class of diffusers under sequence parallel gives what it gives alone, or is refused by name."""

from __future__ import annotations

import diffusers
import pytest
import torch

import parafuse
from parafuse.errors import ParafuseError
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, Layout, parallel
from tests.zoo.collect import cases, error, inputs_of, outputs, randomized

REFUSED = {
    "Kandinsky6SRTransformer3DModel": "flex_attention",
    "SanaWMTransformer3DModel": "none of its blocks can be split",
}
"""Case -> a part of the refusal."""


def compare(name: str, layout: Layout) -> float | str:
    """Relative error against the plain model, or the refusal."""
    case = cases()[name]
    model = randomized(case.build())
    plain = outputs(model, inputs_of(case, case.sizes))
    try:
        with parafuse.apply(model, parallel(layout)):
            return error(outputs(model, inputs_of(case, case.sizes)), plain)
    except ParafuseError as refusal:
        return str(refusal)


@pytest.mark.parametrize("layout", [(1, 3)], ids=str)
@pytest.mark.parametrize("name", [name for name in cases() if ":" not in name])  # `make support-ci` has the others
def test_a_class_is_exact_or_refused(name: str, layout: Layout) -> None:
    for found in run_ranks(compare, layout[0] * layout[1], name, layout):
        if name in REFUSED:
            assert REFUSED[name] in str(found)
        else:
            assert not isinstance(found, str), found
            assert found <= EXACT


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
