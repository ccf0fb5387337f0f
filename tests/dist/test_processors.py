"""Attention processors that a user has set before parafuse is applied: sliced, written out, their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import parafuse
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, Layout, parallel
from tests.models import ODD, build, call, error, inputs
from tests.zoo.collect import cases, inputs_of, outputs, randomized


def sliced(model: Any) -> None:
    """As `enable_attention_slicing` of a pipeline does."""
    for module in model.modules():
        if hasattr(module, "set_attention_slice"):
            module.set_attention_slice(1)


def written_out(model: Any) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


SETTINGS = {"sliced": sliced, "written out": written_out}


def error_with(name: str, setting: str, layout: Layout) -> float:
    case = cases()[name]
    model = randomized(case.build()).eval()
    before = outputs(model, inputs_of(case, case.sizes))
    processors = [type(module.processor) for module in model.modules() if hasattr(module, "processor")]
    SETTINGS[setting](model)
    assert processors != [type(module.processor) for module in model.modules() if hasattr(module, "processor")]
    want = outputs(model, inputs_of(case, case.sizes))
    assert error(want[0], before[0]) < 1e-5
    with parafuse.apply(model, parallel(layout)):
        return max(map(error, outputs(model, inputs_of(case, case.sizes)), want))


@pytest.mark.parametrize("layout", [(1, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "DiTTransformer2DModel", "PriorTransformer"])
def test_attention_that_torch_does_not_name(name: str, setting: str, layout: Layout) -> None:
    assert max(run_ranks(error_with, layout[0] * layout[1], name, setting, layout)) <= EXACT


class OwnProcessor:
    """A user's: joint attention of FLUX with other scales, heads first, and without diffusers' dispatch."""

    def __init__(self, sharpness: float):
        self.sharpness = sharpness

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
            split = x.unflatten(-1, (attn.heads, -1)).movedim(-2, 1)
            return split if norm is None else norm(split)

        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = heads(q, attn.norm_q), heads(k, attn.norm_k), heads(v, None)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added = [project(encoder_hidden_states) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            q, k, v = (F.pad(x, (0, 0, text, 0)) for x in (q, k, v))
            for x, more, norm in zip((q, k, v), added, norms, strict=True):
                x[:, :, :text] = heads(more, norm)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.sharpness / q.shape[-1] ** 0.5)
        out = out.movedim(1, -2).flatten(-2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])


def error_with_own(layout: Layout) -> tuple[float, float]:
    """(error under the processor, what the processor changes)."""
    model: Any = build("flux")
    values = inputs("flux", ODD)
    plain = call(model, values)
    model.set_attn_processor(OwnProcessor(1.5))
    want = call(model, values)
    with parafuse.apply(model, parallel(layout)):
        return error(call(model, values), want), error(want, plain)


@pytest.mark.parametrize("layout", [(1, 2), (1, 3), (2, 2)], ids=str)
def test_a_processor_of_the_users_own(layout: Layout) -> None:
    for found, change in run_ranks(error_with_own, layout[0] * layout[1], layout):
        assert found <= EXACT < 1e-3 < change
