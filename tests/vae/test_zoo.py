"""The zoo of autoencoders is whole, and each of them runs."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import parafuse
from tests.vae import case as zoo
from tests.vae.case import Case
from tests.vae.zoo import CASES


def test_every_class_is_in_the_zoo() -> None:
    from diffusers.models import autoencoders

    classes = {name for name, one in inspect.getmembers(autoencoders, inspect.isclass) if issubclass(one, nn.Module)}
    assert {case.cls for case in CASES} == classes


@pytest.mark.parametrize("case", [case for case in CASES if not case.unbuilt], ids=lambda case: case.name)
@pytest.mark.parametrize("odd", [False, True])
def test_it_runs(case: Case, odd: bool) -> None:
    module = zoo.build(case)
    results = [zoo.decode(case, module, zoo.latents(case, odd=odd))]
    if case.picture:
        results.append(zoo.encode(case, module, zoo.picture(case, odd=odd)))
    for result in results:
        assert bool(result.isfinite().all())
        assert float(result.std()) > 1e-2
        assert not torch.equal(result[0], result[1])  # two samples
    if odd:
        with parafuse.apply(module) as handle:  # also on one rank it is looked at
            assert handle.applied == []


@pytest.mark.parametrize("case", [case for case in CASES if case.unbuilt], ids=lambda case: case.name)
def test_what_is_left_out_has_a_reason(case: Case) -> None:
    assert len(case.unbuilt.split()) > 5
    assert not case.latents
    assert not case.picture
