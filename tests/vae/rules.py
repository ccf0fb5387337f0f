"""Operators on slabs against the same operators on whole tensors, as functions that ranks run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from parafuse.engine.vae.sharded import made_whole
from parafuse.errors import UnsupportedError
from parafuse.parallel.comm import counters
from parafuse.parallel.slab import Cut, Slab, SlabRanks, even_bounds
from parafuse.parallel.slab_blank import Blanks

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """`function` of a tensor of `shape` that is split along `dim`."""

    name: str
    shape: tuple[int, ...]
    dim: int
    function: Function
    most_calls: int | None = None
    """Exchanges that it may take at most."""


def _weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _conv2d(x: Tensor, **more: Any) -> Tensor:
    return functional.conv2d(x, _weight(6, x.shape[1], 3, 3), _weight(6), **more)


def _group_norm(x: Tensor) -> Tensor:
    return functional.group_norm(x, 2, _weight(x.shape[1]), _weight(x.shape[1]))


def _self_attention(x: Tensor) -> Tensor:
    """(B, C, H, W): all positions see each other."""
    tokens = x.flatten(2).transpose(1, 2).unflatten(-1, (2, -1)).transpose(1, 2)
    out = functional.scaled_dot_product_attention(tokens, 2 * tokens, tokens - 1)
    return out.transpose(1, 2).flatten(2).transpose(1, 2).view_as(x)


def _per_frame_attention(x: Tensor) -> Tensor:
    """(B, C, T, H, W): positions of a frame see each other."""
    b, c, t, h, w = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
    mask = torch.arange(h * w)[:, None] * 0.1 - torch.arange(h * w) * 0.2
    out = functional.scaled_dot_product_attention(tokens, tokens, tokens, mask[None])
    return out.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


def _frames_attention(x: Tensor, *, causal: bool) -> Tensor:
    """(B, C, T, H, W): each position sees itself in other frames; split in the batch of attention."""
    b, c, t, h, w = x.shape
    tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c)
    out = functional.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=causal)
    return out.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)


def _tokens_of_all_frames(x: Tensor) -> Tensor:
    """Tokens (t h w), causal over all of them."""
    tokens = x.flatten(2).transpose(1, 2)
    out = functional.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)
    return out.transpose(1, 2).unflatten(2, x.shape[2:])


def _scores_attention(x: Tensor) -> Tensor:
    """As models without a fused kernel write it."""
    tokens = x.flatten(2).transpose(1, 2)
    blank = torch.empty(x.shape[0], tokens.shape[1], tokens.shape[1])
    scores = torch.baddbmm(blank, tokens, tokens.transpose(1, 2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), tokens)


def _linear_attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).relu()
    sums = tokens @ tokens.transpose(1, 2)
    return (sums @ tokens).view_as(x)


def _cached_frames(x: Tensor) -> Tensor:
    """Frames one by one, with the last ones kept for the next: a causal decoder."""
    weight, out = _weight(4, x.shape[1], 3, 3, 3), []
    kept: list[Any] = [None]
    for n in range(x.shape[2]):
        frame = x[:, :, n : n + 1]
        before = torch.zeros_like(frame).repeat(1, 1, 2, 1, 1) if kept[0] is None else kept[0]
        both = torch.cat([before, frame], dim=2)
        kept[0] = both[:, :, -2:].clone()
        out.append(functional.conv3d(functional.pad(both, (1, 1, 1, 1, 0, 0)), weight))
    return torch.cat(out, dim=2)


def _drawn(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return x + torch.randn(x.shape, generator=generator) + torch.randn_like(x) * torch.rand_like(x)


def _filled(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1] + 2, *x.shape[2:])
    out[:, :2] = x[:, :2] * 3
    out[:, 2:] = x
    return out


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y += 1
    y[:, 1:3] *= 2
    y[:, :, 2:5] = 0.5
    functional.silu(y, inplace=True)
    y.view(y.shape[0], -1, *y.shape[2:])[:, :1].add_(x[:, 1:2])
    return y


def _depth_to_space(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    y = x.reshape(b, c // 4, 2, 2, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    return y.flatten(5, 6).flatten(3, 4)


def _space_to_depth(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def _register_tokens(x: Tensor) -> Tensor:
    """Tokens (t h w) of a split h, with tokens of the model's own behind them."""
    tokens = torch.cat([x.flatten(2).transpose(1, 2), _weight(1, 3, x.shape[1]).expand(x.shape[0], -1, -1)], dim=1)
    tokens = tokens.softmax(-1) + torch.zeros_like(tokens[:, :1])
    return tokens[:, :-3].transpose(1, 2).unflatten(2, x.shape[2:])


SQUARE = (2, 4, 7, 7)  # height is width
VIDEO = (2, 4, 3, 9, 5)

WINDOWS = (
    Rule("conv2d", (2, 4, 13, 5), 2, lambda x: _conv2d(x, padding=1), 1),
    Rule("conv2d, mended", (2, 2, 61, 40), 2,
         lambda x: functional.conv2d(x, _weight(2, 2, 5, 3), _weight(2), padding=(2, 1)), 1),
    Rule("conv2d, mended, channels last", (2, 2, 61, 40), 2,
         lambda x: functional.conv2d(_channels_last(x), _weight(2, 2, 5, 3), padding=(4, 1), dilation=(2, 1)), 1),
    Rule("conv3d, mended", (2, 2, 3, 31, 20), 3, lambda x: functional.conv3d(x, _weight(2, 2, 3, 3, 3), padding=1), 1),
    Rule("conv2d over the width", SQUARE, 3, lambda x: _conv2d(x, padding=1), 1),
    Rule("conv2d without padding", (2, 4, 13, 5), 2, _conv2d, 1),
    Rule("conv2d, batch split", (5, 4, 6, 5), 0, lambda x: _conv2d(x, padding=1), 0),
    Rule("conv2d, stride 2", (2, 4, 13, 5), 2, lambda x: _conv2d(x, padding=1, stride=2)),
    Rule("conv2d, stride 2, even", (2, 4, 12, 6), 2, lambda x: _conv2d(functional.pad(x, (0, 1, 0, 1)), stride=2)),
    Rule("conv2d, wide reach", (2, 4, 11, 5), 2, lambda x: _conv2d(x, padding=4, dilation=4)),
    Rule("conv2d, large stride", (2, 4, 13, 5), 2, lambda x: _conv2d(x, stride=5)),
    Rule("conv2d of a few rows", (2, 4, 4, 5), 2, lambda x: _conv2d(_conv2d(x, padding=(1, 1))[:, :4], padding=2)),
    Rule("conv2d, channels last", (2, 4, 13, 5), 2, lambda x: _conv2d(_channels_last(x), padding=1)),
    Rule("conv2d, same", (2, 4, 13, 5), 2, lambda x: functional.conv2d(x, _weight(2, 4, 4, 4), padding="same")),
    Rule("conv1d by 1", (2, 4, 13), 2, lambda x: functional.conv1d(x, _weight(3, 4, 1)), 0),
    Rule("conv3d, height", VIDEO, 3, lambda x: functional.conv3d(x, _weight(3, 4, 3, 3, 3), padding=1), 1),
    Rule("conv3d, time", (2, 4, 6, 5, 3), 2, lambda x: functional.conv3d(x, _weight(3, 4, 3, 3, 3), padding=1), 1),
    Rule("conv1d in groups", (2, 4, 17), 2, lambda x: functional.conv1d(x, _weight(4, 1, 7), groups=4, padding=3), 1),
    Rule("transposed", (2, 4, 11), 2, lambda x: functional.conv_transpose1d(x, _weight(4, 3, 8), _weight(3), 4, 2)),
    Rule("transposed, odd", (2, 4, 11), 2,
         lambda x: functional.conv_transpose1d(x, _weight(4, 3, 5), _weight(3), 3, 1, output_padding=2)),
    Rule("transposed with gaps", (2, 4, 9), 2,
         lambda x: functional.conv_transpose1d(x, _weight(4, 3, 2), _weight(3), 4, 0, output_padding=3)),
    Rule("transposed 2d", (2, 4, 7, 5), 2, lambda x: functional.conv_transpose2d(x, _weight(4, 3, 4, 4), None, 2, 1)),
    Rule("pad", (2, 4, 7, 5), 2, lambda x: functional.pad(x, (1, 2, 3, 1), value=2.0), 0),
    Rule("crop by padding", (2, 4, 9, 5), 2, lambda x: functional.pad(x, (0, 0, -4, 1))),
    Rule("pad far", (2, 4, 7), 2, lambda x: functional.conv1d(functional.pad(x, (12, 0)), _weight(2, 4, 5))),
    Rule("replicate", (2, 4, 7, 5), 2, lambda x: functional.pad(x, (1, 1, 2, 3), mode="replicate")),
    Rule("replicate elsewhere", (2, 4, 7, 5), 2, lambda x: functional.pad(x, (1, 1, 0, 0), mode="replicate"), 0),
    Rule("replicate 3d", VIDEO, 3, lambda x: functional.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")),
    Rule("reflect", (2, 4, 9, 5), 2, lambda x: functional.pad(x, (1, 1, 5, 4), mode="reflect")),
    Rule("avg_pool2d", (2, 4, 13, 6), 2, lambda x: functional.avg_pool2d(x, 2)),
    Rule("avg_pool2d, padded", (2, 4, 13, 6), 2, lambda x: functional.avg_pool2d(x, 3, 2, 1)),
    Rule("avg_pool1d", (2, 4, 13), 2, lambda x: functional.avg_pool1d(x, 3, 2)),
    Rule("avg_pool3d", (2, 4, 6, 7, 5), 3, lambda x: functional.avg_pool3d(x, (2, 1, 1)), 0),
    Rule("max_pool2d", (2, 4, 13, 6), 2, lambda x: functional.max_pool2d(x, 3, 2, 1)),
    Rule("nearest", (2, 4, 7, 5), 2, lambda x: functional.interpolate(x, scale_factor=2.0), 0),
    Rule("nearest to a size", (2, 4, 7, 5), 2, lambda x: functional.interpolate(x, size=(17, 9))),
    Rule("nearest, fewer", (2, 4, 13, 8), 2, lambda x: functional.interpolate(x, size=(5, 4))),
    Rule("nearest-exact", VIDEO, 3, lambda x: functional.interpolate(x, size=(3, 20, 7), mode="nearest-exact")),
    Rule("bilinear", (2, 4, 7, 5), 2, lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear")),
    Rule("bilinear, corners", (2, 4, 7, 5), 3,
         lambda x: functional.interpolate(x, size=(9, 11), mode="bilinear", align_corners=True)),
    Rule("bicubic, antialiased", (2, 4, 13, 5), 2,
         lambda x: functional.interpolate(x, size=(6, 7), mode="bicubic", antialias=True)),
    Rule("trilinear", VIDEO, 3, lambda x: functional.interpolate(x, size=(2, 13, 9), mode="trilinear")),
    Rule("linear", (2, 4, 9), 2, lambda x: functional.interpolate(x, scale_factor=3.0, mode="linear")),
    Rule("unfold", (2, 4, 17), 2, lambda x: x.unfold(2, 5, 3)),
    Rule("stft", (2, 67), 1, lambda x: torch.stft(x, 8, 3, window=torch.hann_window(8), return_complex=True).abs()),
    Rule("cached frames", VIDEO, 3, _cached_frames),
)  # fmt: skip

VIEWS = (
    Rule("flatten and back", SQUARE, 2, lambda x: x.flatten(2).transpose(1, 2).reshape(2, 7, 7, 4), 0),
    Rule("merge with the batch", VIDEO, 3,
         lambda x: x.permute(0, 2, 3, 4, 1).flatten(0, 3).sin().view(2, 3, 9, 5, 4), 0),
    Rule("space to depth", (2, 4, 10, 6), 2, _space_to_depth),
    Rule("depth to space", VIDEO, 3, _depth_to_space, 0),
    Rule("pixel_shuffle", (2, 4, 7, 7), 2, lambda x: functional.pixel_shuffle(x, 2), 0),
    Rule("pixel_unshuffle", (2, 4, 14, 6), 2, lambda x: functional.pixel_unshuffle(x, 2)),
    Rule("repeat_interleave", SQUARE, 2, lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(3, dim=1), 0),
    Rule("repeat", SQUARE, 2, lambda x: x.repeat(2, 3, 1, 1), 0),
    Rule("repeat the split dim", SQUARE, 2, lambda x: _conv2d(x.repeat(1, 1, 2, 1), padding=1)),
    Rule("chunk channels", SQUARE, 2, lambda x: x.chunk(2, 1)[1] * 2, 0),
    Rule("chunk the split dim", (2, 4, 11, 3), 2, lambda x: [_conv2d(c, padding=1) for c in x.chunk(3, 2)]),
    Rule("slices", (2, 4, 13, 3), 2, lambda x: x[:, 1:, 3:-2] + x[:, :3, 1:9], None),
    Rule("every other", (2, 4, 13, 3), 2, lambda x: [x[:, :, ::2], x[:, :, 1::3]], None),
    Rule("one row", SQUARE, 2, lambda x: [x[:, :, 3], x[:, :, -1] + 1]),
    Rule("one column", SQUARE, 2, lambda x: x[..., 3], 1),
    Rule("one row that stays a dim", SQUARE, 2, lambda x: x * x[:, :, :1]),
    Rule("rows by number", SQUARE, 2, lambda x: [x[:, :, torch.tensor([5, 0, 0, 3, 6])], x[:, torch.tensor([2, 0])]]),
    Rule("flip", SQUARE, 2, lambda x: x.flip(2, 3)),
    Rule("cat", SQUARE, 2, lambda x: torch.cat([x, x * 2, torch.ones_like(x)], dim=1), 0),
    Rule("cat with a whole one", SQUARE, 2, lambda x: torch.cat([_weight(2, 3, 7, 7), x], dim=1), 0),
    Rule("cat along the split dim", SQUARE, 2, lambda x: torch.cat([_weight(2, 4, 3, 7), x, x[:, :, 2:]], dim=2)),
    Rule("stack", SQUARE, 2, lambda x: torch.stack([x, x + 1], dim=2).flatten(2, 3)),
    Rule("unbind", SQUARE, 2, lambda x: [*x.unbind(1), *x.unbind(2)]),
    Rule("squeeze", (2, 1, 7, 1), 2, lambda x: x.squeeze().unsqueeze(1) + x.squeeze(3).unsqueeze(0)[0], None),
    Rule("expand", (2, 1, 7, 3), 2, lambda x: x.expand(5, 2, 4, -1, -1) + 0, 0),
    Rule("registers", VIDEO, 3, _register_tokens),
    Rule("filled", VIDEO, 3, _filled, 0),
    Rule("in place", SQUARE, 2, _in_place),
)  # fmt: skip

SUMS = (
    Rule("group_norm", (2, 4, 13, 5), 2, _group_norm, 1),
    Rule("group_norm far from zero", (2, 4, 13, 5), 2, lambda x: _group_norm(x + 100), 1),
    Rule("group_norm, batch split", (5, 4, 6, 5), 0, _group_norm, 0),
    Rule("group_norm, channels last", (2, 4, 13, 5), 2, lambda x: _group_norm(_channels_last(x)), 1),
    Rule("group_norm of frames", VIDEO, 3, lambda x: _group_norm(x.transpose(1, 2).flatten(0, 1)), 1),
    Rule("layer_norm", SQUARE, 2,
         lambda x: functional.layer_norm(x.movedim(1, -1), (4,), _weight(4)).movedim(-1, 1), 0),
    Rule("rms_norm", SQUARE, 2, lambda x: functional.rms_norm(x.movedim(1, -1), (4,)), 0),
    Rule("normalize", SQUARE, 2, lambda x: functional.normalize(x, dim=1), 0),
    Rule("softmax", SQUARE, 2, lambda x: [x.softmax(1), (9 * x).softmax(2)], 1),
    Rule("mean and sum", SQUARE, 2, lambda x: [x.mean((2, 3)), x.sum(2, keepdim=True), x.mean(), x.sum(1)], 3),
    Rule("var", SQUARE, 2, lambda x: [x.var((2, 3)), x.std(2, correction=0), *torch.var_mean(x + 50, dim=(1, 2, 3))]),
    Rule("extremes", SQUARE, 2, lambda x: [x.amax(2), x.min(), x.argmax(1), x.max(1)[0], (x > 3).any()]),
    Rule("norm", SQUARE, 2, lambda x: [torch.linalg.vector_norm(x, dim=2), x.norm(dim=1)], 1),
    Rule("linear", SQUARE, 2, lambda x: functional.linear(x, _weight(5, 7), _weight(5)), 0),
    Rule("linear over the split dim", SQUARE, 3, lambda x: functional.linear(x, _weight(5, 7), _weight(5)), 1),
    Rule("matmul", SQUARE, 2, lambda x: [x @ x, x.transpose(2, 3) @ x, _weight(7, 7) @ x]),
    Rule("einsum", SQUARE, 2,
         lambda x: [torch.einsum("bchw,bdhw->bcd", x, x), torch.einsum("bchw,dc->bdhw", x, _weight(5, 4))]),
    Rule("attention", SQUARE, 2, _self_attention, 1),
    Rule("attention of a frame", VIDEO, 3, _per_frame_attention, 1),
    Rule("attention of frames", VIDEO, 3, lambda x: _frames_attention(x, causal=True), 0),
    Rule("attention over all", VIDEO, 3, _tokens_of_all_frames, 1),
    Rule("attention by scores", SQUARE, 2, _scores_attention, 2),
    Rule("linear attention", SQUARE, 2, _linear_attention, 1),
    Rule("cdist", SQUARE, 2, lambda x: torch.cdist(x.permute(0, 2, 3, 1).flatten(0, 2), _weight(9, 4)).argmin(1), 0),
    Rule("random", SQUARE, 2, _drawn, 0),
    Rule("where", SQUARE, 2, lambda x: torch.where(x > 0, x, torch.linspace(0, 1, 7)[:, None]).clamp(-1, 0.5), 0),
    Rule("equal sizes", (4, 4, 4, 4), 2,
         lambda x: x + _weight(4, 1, 1) * torch.arange(4)[:, None] - torch.arange(4), 0),
)  # fmt: skip

RULES = {"windows": WINDOWS, "views": VIEWS, "sums": SUMS}

REFUSED: tuple[tuple[str, str, Function], ...] = (
    ("cumsum", "cumsum", lambda x: x.cumsum(2)),
    ("fft", "aten._fft_r2c", lambda x: torch.fft.rfft(x, dim=1)),
    ("roll", "roll", lambda x: x.roll(1, 2)),
    ("out", "aten.add", lambda x: torch.add(x, 1, out=torch.empty(2, 4, 7, 7))),
    ("row", "Tensor.__setitem__", lambda x: x.__setitem__((slice(None), slice(None), 3), 0.0)),
    ("row in place", "Tensor.mul_", lambda x: x[:, :, 3].mul_(2)),
    ("whole in place", "aten.add_", lambda x: torch.zeros(2, 4, 7, 7).add_(x)),
    ("view", "view", lambda x: x.flatten().view(49, 8)),
    ("topk", "topk", lambda x: x.topk(2, dim=2)),
    ("item", "aten._local_scalar_dense", lambda x: x[:1, :1, :1, :1].item()),
    ("two dims", "aten.add", lambda x: x + x.transpose(2, 3)),
    ("batch norm", "batch_norm", lambda x: functional.batch_norm(x, None, None, training=True)),
)
"""What is refused, and by which operator."""


def ranks() -> SlabRanks:
    group = dist.group.WORLD
    assert group is not None
    return SlabRanks(group)


def calls() -> int:
    """Exchanges so far."""
    return sum(count.calls for count in counters(ranks().group).kinds.values())


def errors_of(kind: str, bounds: str = "even") -> dict[str, float]:
    """Of each rule the largest error against whole tensors, relative to the largest value; inf where it differs in
    kind, took too many exchanges, or was made whole on the way. `bounds`: "thin" gives most rows to the last rank."""
    found: dict[str, float] = {}
    for rule in RULES[kind]:
        x = torch.randn(rule.shape, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            torch.manual_seed(11)
            want = tree_leaves(rule.function(x.clone()))
            slab = _split(x, rule.dim, bounds)
            before = calls()
            torch.manual_seed(11)
            with Blanks():
                got = rule.function(slab)
            took = calls() - before
            got = tree_leaves(made_whole(got))
        found[rule.name] = max(_error(a, b) for a, b in zip(got, want, strict=True))
        if rule.most_calls is not None and took > rule.most_calls and bounds == "even":
            found[rule.name] = float("inf")
    return found


def _split(x: Tensor, dim: int, bounds: str) -> Slab:
    if bounds == "even":
        return Slab.of(x, dim, ranks())
    degree, rank, total = ranks().degree, ranks().rank, x.shape[dim]
    cut = Cut(dim, (0, *(min(r, total) for r in range(degree - 1)), total))  # none, one, ..., the rest
    assert cut.bounds != even_bounds(total, degree)
    return Slab(cut.rows(x, dim, rank).clone(), cut, ranks())


def _error(got: Tensor, want: Tensor) -> float:
    if type(got) is Slab or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.numel():
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6))


def refusals() -> dict[str, str]:
    """The error of each of REFUSED, and how many exchanges it took."""
    found: dict[str, str] = {}
    for name, _, function in REFUSED:
        slab = Slab.of(torch.randn(2, 4, 7, 7), 2, ranks())
        try:
            function(slab)
            found[name] = "no error"
        except UnsupportedError as error:
            found[name] = str(error)
    return found


def errors_without(what: str) -> dict[str, float]:
    """`errors_of` windows and sums with one exchange switched off: each must show it."""
    real_exchange, real_gather, real_sum = SlabRanks.exchange, SlabRanks.gather, SlabRanks.sum

    def no_exchange(self: SlabRanks, pieces: Any, sizes: Any, like: Tensor) -> list[Tensor]:
        return [torch.zeros_like(part) for part in real_exchange(self, pieces, sizes, like)]

    def no_gather(self: SlabRanks, x: Tensor) -> Tensor:
        everyone = real_gather(self, x)
        return torch.zeros_like(everyone) + everyone[self.rank]

    try:
        if what == "exchange":
            SlabRanks.exchange = no_exchange
        if what == "sum":
            SlabRanks.sum = lambda self, x: real_sum(self, x) * 0 + x
        if what == "statistics":
            x = torch.randn(2, 4, 13, 5, generator=torch.Generator().manual_seed(7))
            want = _group_norm(x)
            SlabRanks.gather = no_gather
            norm = _group_norm(Slab.of(x, 2, ranks()))
            SlabRanks.gather = real_gather
            return {"group_norm": _error(norm.whole(), want)}  # type: ignore[attr-defined]
        return errors_of("windows") | errors_of("sums")
    finally:
        SlabRanks.exchange, SlabRanks.gather, SlabRanks.sum = real_exchange, real_gather, real_sum
