"""The rewrite `text`: fewer text tokens, no mask where it masks nothing, the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import parafuse
from parafuse.engine.rewrites import gates
from parafuse.engine.rewrites import text as module_of_text
from parafuse.engine.rewrites.text import TrimmedText
from parafuse.engine.stack import block_stack
from parafuse.engine.verify import relative_error
from parafuse.errors import ConfigError
from parafuse.parallel.call_context import CallContext
from tests.dist.ranks import run_ranks
from tests.models import Inputs, Sizes
from tests.rewrites.layouts import painted
from tests.zoo.collect import cases, inputs_of, outputs, randomized

EXACT = 1e-5
ON = parafuse.Config(rewrites="text")
TOKENS = 40


class Masks(TorchFunctionMode):
    """Counts attention calls, those with a mask, and the longest keys."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.masked = self.longest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.calls, self.masked = self.calls + 1, self.masked + (named.get("attn_mask") is not None)
            self.longest = max(self.longest, named["key"].shape[-2])
        return func(*args, **(kwargs or {}))


def given(name: str, valid: tuple[int, ...], mask: str = "encoder_attention_mask") -> tuple[nn.Module, Inputs]:
    """A model and a call whose samples have so many valid text tokens."""
    case = cases()[name]
    values = inputs_of(case, Sizes(grid=case.sizes.grid, text=TOKENS, batch=len(valid)))
    lengths = torch.tensor(valid)[:, None]
    values[mask] = (torch.arange(TOKENS) < lengths).to(values[mask].dtype)
    return randomized(case.build()), values


def of(handle: Any) -> TrimmedText:
    return next(one for one in handle._on[0][1].rewrites if isinstance(one, TrimmedText))


HUNYUAN = "HunyuanVideoTransformer3DModel"


def test_hunyuan_video_attends_to_valid_tokens_without_a_mask() -> None:
    model, values = given(HUNYUAN, (5,))
    with Masks() as plain:
        want = outputs(model, values)
    with parafuse.apply(model, ON) as handle:
        errors = [relative_error(outputs(model, values), want)]
        with Masks() as seen:
            errors.append(relative_error(outputs(model, values), want))
        assert of(handle).seen == {"cut, no mask for 5 parts": 2}
    assert max(errors) <= EXACT
    assert plain.calls == plain.masked == seen.calls  # in plain diffusers each attention has a mask
    assert seen.masked == 0
    assert plain.longest - seen.longest == TOKENS - 5


def test_samples_of_several_lengths_keep_the_mask() -> None:
    model, values = given(HUNYUAN, (18, 3))
    want = outputs(model, values)
    with parafuse.apply(model, ON) as handle:
        outputs(model, values)
        with Masks() as seen:
            assert relative_error(outputs(model, values), want) <= EXACT
        assert of(handle)._kept == {(32, TOKENS)}  # a multiple of 16: few shapes
    assert seen.masked == seen.calls


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("QwenImageTransformer2DModel", "encoder_hidden_states_mask"),
        ("LTXVideoTransformer3DModel", "encoder_attention_mask"),
        ("PixArtTransformer2DModel", "encoder_attention_mask"),
        ("SanaTransformer2DModel", "encoder_attention_mask"),
        ("Lumina2Transformer2DModel", "encoder_attention_mask"),
        ("Krea2Transformer2DModel", "encoder_attention_mask"),  # layers of the encoder, positions of text and image
        ("BriaFibo2Transformer2DModel", "encoder_attention_mask"),
    ],
)
def test_other_models(name: str, mask: str) -> None:
    model, values = given(name, (14, 14), mask)
    want = outputs(model, values)
    with parafuse.apply(model, ON) as handle:
        outputs(model, values)
        with Masks() as seen:
            assert relative_error(outputs(model, values), want) <= EXACT
        assert sum(count for what, count in of(handle).seen.items() if "no mask" in what) == 2
        assert seen.masked == 0


@pytest.mark.parametrize("name", ["HunyuanVideo15Transformer3DModel", "MochiTransformer3DModel"])
def test_models_that_need_their_mask_are_cut_all_the_same(name: str) -> None:
    model, values = given(name, (14, 14))
    want = outputs(model, values)
    with parafuse.apply(model, ON) as handle:
        outputs(model, values)
        assert relative_error(outputs(model, values), want) <= EXACT
        assert (14, TOKENS) in of(handle)._kept


class Attends(nn.Module):
    """Attends by a mask that its model made, or to all."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


class Joint(nn.Module):
    """Masks the picture's tokens too, where these are zeros, as HunyuanVideo 1.5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attends()])

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, picture: Tensor
    ) -> Tensor:
        legible = torch.cat([encoder_attention_mask.bool(), (picture != 0).any(-1)], 1)
        own = torch.ones(hidden_states.shape[:2], dtype=torch.bool)
        tokens = torch.cat([hidden_states, encoder_hidden_states, picture], 1)
        mask = torch.cat([own, legible], 1)[:, None, None]
        return self.blocks[0](tokens, mask)[:, : hidden_states.shape[1]]


def test_a_mask_that_comes_from_other_arguments_too_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """All true in the first call, it must not be left out in a later one."""
    torch.manual_seed(0)
    model = Joint()
    values = dict(
        hidden_states=torch.randn(1, 6, 8), encoder_hidden_states=torch.randn(1, TOKENS, 8),
        encoder_attention_mask=(torch.arange(TOKENS) < 9).float()[None], picture=torch.randn(1, 5, 8),
    )  # fmt: skip
    other = values | dict(picture=torch.zeros(1, 5, 8))
    want = [outputs(model, values), outputs(model, other)]
    with parafuse.apply(model, ON) as handle:
        assert relative_error(outputs(model, values), want[0]) <= EXACT
        assert relative_error(outputs(model, other), want[1]) <= EXACT
        assert of(handle).seen == {"cut, with the mask": 2}
    # Negative control: where values are not followed, it is left out.
    monkeypatch.setattr(gates.Flow, "sources_of", lambda *_: frozenset({2}))
    with parafuse.apply(model, ON):
        assert relative_error(outputs(model, values), want[0]) <= EXACT
        assert relative_error(outputs(model, other), want[1]) > 1e-2


class Pools(nn.Module):
    """Takes a mask, and looks at padding all the same."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.leak = leak

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Any) -> Tensor:
        text = encoder_hidden_states
        mask = torch.ones(text.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
        mask = mask[..., None]
        mean = (text * mask).sum(1) / mask.sum(1) + self.leak * text.mean(1)
        return self.blocks[0](hidden_states) + mean[:, None]


@pytest.mark.parametrize("leak", [0.0, 1e-3])
@pytest.mark.parametrize("is_full_first", [False, True])
def test_padding_that_has_a_part_in_the_result_is_left(
    leak: float, is_full_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Pools(leak)
    values = dict(
        hidden_states=torch.randn(2, 6, 8), encoder_hidden_states=torch.randn(2, TOKENS, 8),
        encoder_attention_mask=(torch.arange(TOKENS) < 9).float().expand(2, -1).contiguous(),
    )  # fmt: skip
    want = outputs(model, values)
    with parafuse.apply(model, ON) as handle:
        if is_full_first:  # that nothing is cut there proves nothing
            outputs(model, values | dict(encoder_attention_mask=torch.ones(2, TOKENS)))
            assert of(handle).seen.pop("cut, no mask given") == 1
        assert relative_error(outputs(model, values), want) <= EXACT
        assert of(handle).seen == ({"left whole": 1} if leak else {"cut, no mask given": 1})
        assert bool(of(handle).why) == bool(leak)
    monkeypatch.setattr(module_of_text, "is_same", lambda *_, **__: True)  # negative control: nothing is proven
    with parafuse.apply(model, ON):
        assert (relative_error(outputs(model, values), want) > EXACT) == bool(leak)


class Restless(Pools):
    """Draws noise in each call, and says so."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Any) -> Tensor:
        found = super().forward(hidden_states, encoder_hidden_states, encoder_attention_mask)
        self.calls = getattr(self, "calls", 0) + 1
        return found + torch.randn(found.shape)


def test_a_call_that_was_made_to_learn_leaves_nothing() -> None:
    """The noise of the model, and what it counts, are those of the calls that were asked for."""
    model, (_, values) = Restless(0.0), given(HUNYUAN, (5, 5))
    values = dict(
        hidden_states=torch.randn(2, 6, 8), encoder_hidden_states=torch.randn(2, TOKENS, 8),
        encoder_attention_mask=values["encoder_attention_mask"].float(),
    )  # fmt: skip
    torch.manual_seed(3)
    want = [outputs(model, values) for _ in range(4)]
    with parafuse.apply(model, ON) as handle:
        torch.manual_seed(3)
        assert max(relative_error(outputs(model, values), one) for one in want) == 0
        assert of(handle).seen == {"left whole": 4}
    assert model.calls == 8


def test_a_mask_is_looked_up_once_and_again_when_it_is_written_to() -> None:
    model, values = given(HUNYUAN, (5,))
    with parafuse.apply(model, ON) as handle:
        for _ in range(4):
            outputs(model, values)
        assert of(handle).masks.looks == 1
        values["encoder_attention_mask"][:, 5:20] = 1
        got = outputs(model, values)
        assert of(handle).masks.looks == 2
    assert relative_error(got, outputs(model, values)) <= EXACT


def test_remove_restores_bit_for_bit() -> None:
    model, values = given(HUNYUAN, (5,))
    want = outputs(model, values)
    before = [sorted((name, str(type(x))) for name, x in vars(part).items()) for part in model.modules()]
    handle = parafuse.apply(model, ON)
    outputs(model, values)
    handle.remove()
    assert [sorted((name, str(type(x))) for name, x in vars(part).items()) for part in model.modules()] == before
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, values), want, strict=True))


def test_other_lengths_need_no_new_proof() -> None:
    (model, values), (plain, _) = given(HUNYUAN, (5,)), given(HUNYUAN, (5,))
    lengths = (5, 17, 1, 40, 39)
    with parafuse.apply(model, ON) as handle:
        for length in lengths:
            want = outputs(plain, masked(values, length))
            assert relative_error(outputs(model, masked(values, length)), want) <= EXACT
        assert len(of(handle)._known) == 2  # one for those that cut nothing
        assert of(handle)._kept == {(length, TOKENS) for length in lengths}


def test_an_empty_text_and_a_mask_with_holes() -> None:
    model, values = given(HUNYUAN, (9, 9))
    values["encoder_attention_mask"][:, 2] = 0
    want = outputs(model, values)
    with parafuse.apply(model, ON) as handle:
        for _ in range(2):
            assert relative_error(outputs(model, values), want) <= EXACT
        assert (16, TOKENS) in of(handle)._kept
        values["encoder_attention_mask"].zero_()
        outputs(model, values)
        assert of(handle).seen["left whole"] == 1


def test_refused_where_no_denoiser_takes_a_mask() -> None:
    flux = cases()["FluxTransformer2DModel"].build()
    with pytest.raises(ConfigError, match=r"rewrites='text'.*takes no mask.*Leave it out"):
        parafuse.apply(flux, ON)
    assert "forward" not in vars(flux)
    with parafuse.apply(flux, parafuse.Config(rewrites="auto")) as handle:
        assert any("rewrite text left off: takes no mask" in line for line in handle.applied)


def test_trial_calls_are_whole() -> None:
    model, values = given(HUNYUAN, (5,))
    with parafuse.apply(model, ON) as handle:
        context: CallContext = of(handle).site.context
        with context.trying(), Masks() as seen:
            outputs(model, values)
        assert seen.masked == seen.calls
        assert not of(handle).seen


def masked(values: Inputs, length: int) -> Inputs:
    return values | dict(encoder_attention_mask=(torch.arange(TOKENS) < length).float()[None])


def test_blocks_compile_and_more_lengths_make_no_more_graphs() -> None:
    model, values = given(HUNYUAN, (5,))
    want = {length: outputs(model, masked(values, length)) for length in (5, 9, 14, 30)}
    made = list[int]()
    torch.compiler.reset()
    graphs = CompileCounter()
    with parafuse.apply(model, ON):
        for block in block_stack(model):
            block.compile(fullgraph=True, backend=graphs)
        for length, expected in want.items():
            assert relative_error(outputs(model, masked(values, length)), expected) <= EXACT
            made.append(graphs.frame_count)
    assert 0 < made[0] <= 3  # kinds of blocks, one of them with two layouts of its argument in memory
    assert made[1] == made[-1] <= 2 * made[0]  # the second length makes lengths symbols


@pytest.mark.parametrize(
    ("degrees", "prompts", "cache"),
    [
        (dict(ulysses=2), 1, ""),
        (dict(cfg=2, ulysses=1), 1, ""),
        (dict(data=2, ulysses=1), 2, ""),
        (dict(ulysses=2), 1, "first-block:0.2"),
    ],
)
def test_on_two_ranks(degrees: dict[str, int], prompts: int, cache: str) -> None:
    steps = 6 if cache else 0
    found = run_ranks(painted, 2, "HunyuanVideo", "text,modulation", degrees, prompts, cache, steps, timeout_s=120)
    for error, applied in found:
        assert error <= EXACT
        assert any("rewrite text" in line and "no mask for" in line for line in applied)
        assert any("looked up" in line for line in applied)
