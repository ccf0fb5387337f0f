"""The grid of a video is found out from one call, for every transformer class, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from parafuse.engine.grid import video_stream
from parafuse.errors import UnsupportedError
from parafuse.parallel.hooks import override
from tests.models import Sizes
from tests.zoo.collect import cases, inputs_of, randomized

VIDEO = Sizes(grid=(3, 4, 6), text=24)
EQUAL = Sizes(grid=(4, 4, 4), text=64)
"""As many frames as rows, columns and channels; as many tokens of text as of the video."""

PICTURES = {
    "AuraFlowTransformer2DModel", "BriaFibo2Transformer2DModel", "BriaFiboTransformer2DModel", "BriaTransformer2DModel",
    "ChromaTransformer2DModel", "CogView3PlusTransformer2DModel", "CogView4Transformer2DModel",
    "ErnieImageTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel", "FluxTransformer2DModel",
    "GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel", "HunyuanImageTransformer2DModel",
    "Krea2Transformer2DModel", "LongCatImageTransformer2DModel", "Lumina2Transformer2DModel",
    "OmniGenTransformer2DModel", "OvisImageTransformer2DModel", "PRXTransformer2DModel", "PixArtTransformer2DModel",
    "QwenImage21Transformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel", "Transformer2DModel",
}  # fmt: skip
"""Classes of pictures, which get one frame."""
OTHER_GRIDS = {
    "DiTTransformer2DModel": (1, 8, 8),  # its pictures are square
    "Kandinsky6SRTransformer3DModel": (3, 8, 8),  # rows and columns come in eights
    "Kandinsky6Transformer3DModel: image to video": (4, 4, 6),  # a picture as one more frame
    "QwenImage21Transformer2DModel": (1, 6, 8),  # rows and columns are even
    "QwenImage21Transformer2DModel: cached text": (1, 6, 8),
    "QwenImageTransformer2DModel: edit with two timesteps": (4, 4, 6),  # a reference of one frame, that of the noise
}
"""Those whose inputs have another grid than the sizes say."""
REFUSED = {
    "AceStepTransformer1DModel": "tokens come in a row",
    "AnyFlowFARTransformer3DModel": "no frames, rows and columns",  # all but the last two frames are compressed
    "DreamLiteTransformer2DModel": "leaves the rest",  # norms over all of a picture
    "DreamLiteTransformer2DModel: grouped queries": "leaves the rest",
    "DreamLiteTransformer2DModel: no self-attention": "leaves the rest",
    "Flux2Transformer2DModel: reference to cache": "tokens come in a row",  # the reference is before the picture
    "Ideogram4Transformer2DModel": "in another place",  # samples are padded at the left
    "JoyImageEditPlusTransformer3DModel: edit": "tokens come in a row",  # pictures of other sizes
    "JoyImageEditTransformer3DModel: edit": "no frames, rows and columns",  # several videos
    "LTX2VideoTransformer3DModel: reference tokens": "tokens come in a row",
    "LatteTransformer3DModel": "folded into the samples",
    "LatteTransformer3DModel: video": "folded into the samples",
    "LongCatAudioDiTTransformer": "tokens come in a row",
    "MiniMaxH3Transformer3DModel: image to video": "do not follow each other",
    "MiniMaxMusic3Transformer1DModel": "tokens come in a row",
    "PriorTransformer": "tokens come in a row",
    "PriorTransformer: Shap-E": "tokens come in a row",
    "QwenImage21Transformer2DModel: edit": "do not follow each other",
    "RFD4ProteinaTransformer": "do not follow each other",
    "Transformer2DModel": "leaves the rest",  # norms over all of a picture
    "Transformer2DModel: discrete": "tokens come in a row",
    "TransformerTemporalModel": "leaves the rest",
}
"""Why, of what the message says."""


def _sizes(name: str, sizes: Sizes) -> Sizes:
    """What the case can do."""
    if name.startswith(("CogVideoXTransformer3DModel: absolute", "WanTransformer3DModel: image")):
        return replace(sizes, text=cases()[name].sizes.text)
    if name.startswith("SkyReelsV2Transformer3DModel: image"):
        return replace(sizes, text=512)
    if name == "SkyReelsV2Transformer3DModel: diffusion forcing":
        return replace(sizes, grid=(4, *sizes.grid[1:]))
    if name.startswith("Cosmos3Omni"):
        return replace(sizes, batch=1)
    if name.partition(":")[0] in PICTURES:
        return replace(sizes, grid=(1, 5, 7))
    return sizes


@pytest.mark.parametrize("name", [name for name in cases() if name not in REFUSED])
def test_grids_of_all_classes(name: str) -> None:
    case = cases()[name]
    model = randomized(case.build())
    sizes = _sizes(name, VIDEO)
    found = video_stream(model, (), inputs_of(case, sizes))
    assert found.grid == OTHER_GRIDS.get(name, sizes.grid)
    assert 0 <= found.first <= found.total - found.length


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    case = cases()[name]
    sizes = VIDEO if name not in ("PriorTransformer", "Transformer2DModel: discrete") else case.sizes
    with pytest.raises(UnsupportedError) as caught:
        video_stream(randomized(case.build()), (), inputs_of(case, sizes))
    assert REFUSED[name] in str(caught.value)
    assert "grid=FRAMESxROWSxCOLUMNS" in str(caught.value)


NAMED = ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel",
         "MochiTransformer3DModel", "AnyFlowTransformer3DModel", "LTX2VideoTransformer3DModel",
         "Kandinsky5Transformer3DModel",
         "MiniMaxH3Transformer3DModel", "EasyAnimateTransformer3DModel", "CogVideoXTransformer3DModel"]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", NAMED)
def test_equal_sizes_do_not_confuse_it(name: str, batch: int) -> None:
    case = cases()[name]
    found = video_stream(randomized(case.build()), (), inputs_of(case, replace(EQUAL, batch=batch)))
    assert found.grid == (4, 4, 4)
    assert "hidden_states" in found.source


@pytest.mark.parametrize(
    "name", ["HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel", "Lumina2Transformer2DModel"]
)
def test_the_leaf_is_the_one_of_the_first_block(name: str) -> None:
    """Changed in that leaf alone, rows of the block's first attention change where the tokens are."""
    case = cases()[name]
    model, values = randomized(case.build()), inputs_of(case, VIDEO)
    found = video_stream(model, (), values)
    given: list[Any] = []

    def listen(*args: Any, **kwargs: Any) -> Any:
        given.append(tree_flatten((args, kwargs))[0])
        return original(*args, **kwargs)

    original = found.block.forward
    undo = override(found.block, "forward", listen)
    with torch.no_grad():
        model(**values)
    undo()
    stream = given[0][found.leaf]
    assert isinstance(stream, Tensor)
    assert stream.shape[0] == VIDEO.batch
    assert [stream.shape[d] for d in found.dims] == [found.total]


def test_a_given_grid_is_checked() -> None:
    case = cases()["LTXVideoTransformer3DModel"]
    model, values = randomized(case.build()), inputs_of(case, VIDEO)
    assert video_stream(model, (), values, grid=(6, 4, 3)).grid == (6, 4, 3)
    with pytest.raises(UnsupportedError, match="it has 72 tokens"):
        video_stream(model, (), values, grid=(3, 4, 5))
    case = cases()["WanTransformer3DModel"]
    model, values = randomized(case.build()), inputs_of(case, VIDEO)
    assert video_stream(model, (), values, grid=(3, 4, 6)).grid == (3, 4, 6)
    with pytest.raises(UnsupportedError, match="it has 3x4x6 tokens, not 6x4x3"):
        video_stream(model, (), values, grid=(6, 4, 3))


def test_numbers_alone_are_taken_where_no_table_is() -> None:
    model = Plain()
    x = torch.randn(2, 24, 8)
    assert video_stream(model, (x,), dict(frames=2, rows=3, columns=4)).grid == (2, 3, 4)
    assert video_stream(model, (x,), dict(shape=[(1, 4, 6)])).grid == (1, 4, 6)
    with pytest.raises(UnsupportedError, match="no numbers that say a grid"):
        video_stream(model, (x,), dict(frames=2, rows=3, columns=5))
    with pytest.raises(UnsupportedError, match="numbers that say 2x3x4 and 4x3x2"):
        video_stream(model, (x,), dict(shape=[(2, 3, 4), (4, 3, 2)]))


def test_positions_go_before_numbers_that_they_contradict() -> None:
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).float()
    found = video_stream(Plain(), (torch.randn(2, 24, 8),), dict(shape=(4, 3, 2), ids=ids))
    assert found.grid == (2, 3, 4)
    assert "ids" in found.source


@pytest.mark.parametrize("how", ["shuffled", "columns first", "overlapping", "mixed", "two frames alike"])
def test_tokens_in_another_order_are_refused(how: str) -> None:
    with pytest.raises(UnsupportedError, match=r"shuffles its tokens|no frames, rows and columns|leaves the rest"):
        video_stream(Patches(how), (torch.randn(2, 3, 4, 6, 4),), {})


def test_patches_of_any_kind_are_found() -> None:
    found = video_stream(Patches(""), (torch.randn(2, 3, 4, 6, 4),), {})
    assert (found.grid, found.first, found.total) == ((4, 3, 2), 5, 30)


def test_the_model_is_left_as_it_was() -> None:
    case = cases()["HunyuanVideoTransformer3DModel"]
    model, values = randomized(case.build()), inputs_of(case, VIDEO)
    modules = [dict(vars(part)) for part in model.modules()]
    tensors = {name: x.clone() for name, x in values.items() if isinstance(x, Tensor)}
    state, noise = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    video_stream(model, (), values)
    assert [dict(vars(part)) for part in model.modules()] == modules
    assert all(torch.equal(values[name], x) for name, x in tensors.items())
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)


class Plain(nn.Module):
    """Tokens as they are given; numbers and tables that nothing is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.blocks[0](x)


class Patches(nn.Module):
    """(B, C, F, R, C') in patches of 1 x 2 x 2, between 5 tokens of its own before and 1 after."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        size, stride = ((1, 3, 3), (1, 2, 2)) if how == "overlapping" else ((1, 2, 2), (1, 2, 2))
        self.embed = nn.Conv3d(3, 8, size, stride, padding=(0, 1, 1) if how == "overlapping" else 0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        cells = self.embed(x)
        if self.how == "two frames alike":
            cells = cells[:, :, (0, 0, 2, 3)]
        if self.how == "mixed":
            cells = cells / cells.norm()
        tokens = (cells.transpose(2, 4) if self.how == "columns first" else cells).flatten(2).mT
        if self.how == "shuffled":
            tokens = tokens.flip(1)
        own = tokens.new_ones(len(tokens), 6, 8)
        return self.blocks[0](torch.cat([own[:, :5], tokens, own[:, 5:]], dim=1))
