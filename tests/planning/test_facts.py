"""Facts of models against torch's own counter, against what ranks do, and against what is sent."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from parafuse.config import Config
from parafuse.engine.planner import resolve
from parafuse.engine.planning.facts import ATTENTION, CONVOLUTION, DECODE, DENOISE, ENCODE, GEMM, PRODUCTS, Facts, Part
from parafuse.engine.planning.follow import follow_module
from parafuse.engine.planning.gather import gather
from parafuse.engine.source import locate
from parafuse.parallel.layout import ulysses_bytes
from tests.zoo.case import Case
from tests.zoo.collect import cases, inputs_of

WITHIN = 0.01
REFUSED = "SanaWMTransformer3DModel"
"""That docs/support.md refuses in every layout, and that can be followed."""
aten = torch.ops.aten


def _cpu_attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def counted(module: torch.nn.Module, **inputs: object) -> int:
    """Floating-point operations of a call, by torch's counter."""
    known = {aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        module(**inputs)
    return counter.get_total_flops()


def followed(case: Case, *, alone: bool) -> tuple[Part, int]:
    torch.manual_seed(0)
    module = case.build()
    inputs = inputs_of(case, case.sizes)
    return follow_module(module, (), inputs, alone=alone), counted(module, **inputs)


UNWATCHED = {
    "AnyFlowFARTransformer3DModel": "flex_attention",
    "Kandinsky6SRTransformer3DModel": "flex_attention",
    "HiDreamImageTransformer2DModel": "bincount",
}
"""Class, or a configuration of it -> what it does that tells nothing without values: an attention that takes
functions, and experts whose tokens go by values that are computed. For these an engine takes Ulysses, and says why."""


def _unwatched(name: str) -> str:
    return next((why for start, why in UNWATCHED.items() if name.startswith(start)), "")


@pytest.mark.parametrize("name", UNWATCHED)
def test_what_cannot_be_followed_is_an_error(name: str) -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match=UNWATCHED[name]):
        followed(cases()[name], alone=True)
    x = torch.randn(1, 1, 8, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        assert flex_attention(x, x, x).shape == x.shape, "Dynamo remembers a trace that has failed"


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(
    "case", [one for name, one in cases().items() if not _unwatched(name)], ids=lambda case: case.name
)
def test_work_is_what_torch_counts(case: Case) -> None:
    part, truth = followed(case, alone=True)
    mine = sum(part.total(family) for family in PRODUCTS)
    assert mine == pytest.approx(truth, rel=WITHIN)


@pytest.mark.parametrize("name", [REFUSED, "WanTransformer3DModel", "PixArtTransformer2DModel"])
def test_what_no_layout_can_share_is_refused(name: str) -> None:
    part, _ = followed(cases()[name], alone=False)
    assert bool(part.refused) == (name == REFUSED), part.refused
    assert bool(part.shared) != bool(part.refused)


def flux(tokens: int = 96, text: int = 32):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, tokens, 16),
        "encoder_hidden_states": torch.randn(1, text, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    return model, inputs


def test_a_rank_of_a_sequence_does_its_part() -> None:
    model, inputs = flux()
    part = follow_module(model, (), inputs)
    for degree in (2, 4, 8):
        assert part.total(ATTENTION, degree) == pytest.approx(part.total(ATTENTION) / degree)
    # all but the modulation of blocks, which has one row, is divided
    replicated = sum(one.count * one.flops.whole for one in part.shared if one.family == GEMM)
    assert part.total(GEMM, 8) == pytest.approx(replicated + (part.total(GEMM) - replicated) / 8, rel=WITHIN)
    assert 0 < replicated < 0.1 * part.total(GEMM)
    assert part.heads == (4,)
    assert part.tokens == 128
    assert part.blocks == {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}


def test_what_is_sent_is_what_the_formula_says() -> None:
    model, inputs = flux()
    part = follow_module(model, (), inputs)
    sent = part.exchanges
    for degree in (2, 3, 4):
        expected = 4 * ulysses_bytes(rows=128, width=64, item_bytes=4, degree=degree)
        assert sent.ulysses_bytes / degree * (degree - 1) / degree == pytest.approx(expected)
    assert (sent.attention_calls, sent.ulysses_calls) == (4, 8)
    assert sent.ring_bytes == pytest.approx(4 * 2 * 128 * 64 * 4)
    assert sent.gather_calls == 1


def test_lengths_do_not_hide_behind_the_width() -> None:
    """As many tokens as the model is wide: the sizes say nothing, the two degrees do."""
    model, inputs = flux(tokens=32, text=32)
    part = follow_module(model, (), inputs)
    assert part.total(ATTENTION, 4) == pytest.approx(part.total(ATTENTION) / 4)


def test_what_a_compiler_fuses_moves_less_than_its_operators_and_reads_what_it_needs() -> None:
    model, inputs = flux()
    part = follow_module(model, (), inputs)
    inside = [one for one in part.alone if one.where and one.family not in (*PRODUCTS, "view")]
    fused = sum(one.count * one.bytes.on(1) for one in inside if one.family == "fused")
    single = sum(one.count * one.bytes.on(1) for one in inside if one.family != "fused")
    products = sum(one.count * one.bytes.on(1) for one in part.alone if one.where and one.family in PRODUCTS)
    assert 0.2 * products < fused < 0.7 * single


def test_following_leaves_the_model_alone() -> None:
    model, inputs = flux()
    with torch.no_grad():
        before = model(**inputs)[0]
    forward = model.forward
    follow_module(model, (), inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
    assert model.forward == forward
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def facts_of(name: str, **call: object) -> Facts:
    source = locate(name)
    return gather(source, resolve(Config(device="cpu"), source, 1), call)


def test_a_request_of_stacked_branches() -> None:
    found = facts_of("tiny:sd3.5-large", num_inference_steps=3)
    (part,) = found.of(DENOISE)
    assert (found.branches, found.stacked, found.steps, found.pictures) == (2, True, 3, 1)
    assert (part.calls, part.rows) == (3, 2)
    assert {one.phase for one in found.parts} == {ENCODE, DENOISE, DECODE}
    assert sum(one.total(CONVOLUTION) for one in found.of(DECODE)) > 0


def test_a_request_of_two_calls_a_step_and_two_denoisers() -> None:
    found = facts_of("tiny:wan2.2-a14b", num_inference_steps=4)
    assert (found.branches, found.stacked) == (2, False)
    assert sum(part.calls for part in found.of(DENOISE)) == 8
    assert len(found.of(DENOISE)) == 2


def test_pictures_and_a_unet() -> None:
    found = facts_of("tiny:sdxl", num_images_per_prompt=2)
    (part,) = found.of(DENOISE)
    assert (found.pictures, found.branches, part.rows) == (2, 2, 4)
    assert "has no block stack" in found.refused


def test_samples_that_come_as_a_list() -> None:
    found = facts_of("tiny:z-image-turbo")
    assert (found.branches, found.of(DENOISE)[0].rows) == (1, 1)


def test_facts_in_true_size_need_no_weights() -> None:
    """FLUX.1 at 1024 x 1024: 59.5 TFLOP of products and 14.9 of attention, as worked out by hand from its sizes."""
    source = locate("random:flux.1-dev")
    plan = resolve(Config(device="cuda"), source, 1, elsewhere=True)
    found = gather(source, dataclasses.replace(plan, device="cuda"))
    (part,) = found.of(DENOISE)
    assert part.total(GEMM) == pytest.approx(59.5e12, rel=WITHIN)
    assert part.total(ATTENTION) == pytest.approx(14.9e12, rel=WITHIN)
    assert found.weights["transformer"] == pytest.approx(2 * 11901408320)
    assert part.heads == (24,)
