"""What ranks run of the tests of sharded autoencoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parafuse.engine.memory.ledger import Ledger
from parafuse.engine.vae.sharded import ShardedAutoencoder
from parafuse.errors import ParafuseError
from parafuse.parallel.comm import counters
from parafuse.parallel.part_state import Snapshot
from tests.vae import case as cases
from tests.vae.case import Case
from tests.vae.zoo import CASES

METHODS = {"decode": (cases.decode, cases.latents), "encode": (cases.encode, cases.picture)}


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def shard(module: Any) -> ShardedAutoencoder:
    group = dist.group.WORLD
    assert group is not None
    handle = ShardedAutoencoder("vae", module, group)
    handle.install()
    return handle


def relative(got: Tensor, want: Tensor) -> float:
    if type(got) is not Tensor or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def errors(name: str, batch: int, odd: bool, form: str = "") -> dict[str, float | str]:
    """decode and encode of a case against one process alone, by method; the text of what was refused.

    `form`: "tiled", "sliced" or "channels_last": in these it is called again, and once more when all is taken off."""
    case = case_named(name)
    module = cases.build(case)
    found: dict[str, float | str] = {}
    if form == "tiled":
        cases.tile(case, module)
    if form == "sliced":
        module.enable_slicing()
    if form == "channels_last":
        module = module.to(memory_format=torch.channels_last)
    for method, (run, inputs) in METHODS.items():
        if not (case.latents if method == "decode" else case.picture):
            continue
        x = inputs(case, batch=batch, odd=odd)
        torch.manual_seed(1)
        want = run(case, module, x)
        handle = shard(module)
        torch.manual_seed(1)
        before = dict(counters(handle.ranks.group).kinds)
        try:
            got = run(case, module, x)
            again = run(case, module, x) if form and not case.draws else got
            found[method] = relative(got, want) if torch.equal(got, again) else float("inf")
            if got.stride() != want.stride() and form == "channels_last":
                found[method] = float("inf")
            if not before and not counters(handle.ranks.group).kinds:
                found[method] = float("inf")  # nothing was split
        except ParafuseError as error:
            found[method] = str(error)
        handle.remove()
        assert method not in vars(module)
        if form:
            assert torch.equal(_seeded(run, case, module, x), want)
    return found


def _seeded(run: Any, case: Case, module: Any, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return run(case, module, x)


def too_small() -> str:
    case = case_named("AutoencoderKL")
    module = cases.build(case)
    shard(module)
    before = {kind: count.calls for kind, count in counters("0").kinds.items()}
    try:
        module.decode(torch.randn(1, 4, 2, 1))
    except ParafuseError as error:
        assert {kind: count.calls for kind, count in counters("0").kinds.items()} == before
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused_early(name: str, method: str) -> tuple[str, list[int], bool]:
    """What is refused, calls and bytes that were exchanged for it, and whether the module is as it was."""
    case = case_named(name)
    module = cases.build(case)
    handle = shard(module)
    run, inputs = METHODS[method]
    kinds = counters(handle.ranks.group).kinds
    before, attributes = {kind: (c.calls, c.bytes) for kind, c in kinds.items()}, Snapshot(module)
    try:
        run(case, module, inputs(case))
    except ParafuseError as error:
        sent = [sum(c.calls - before.get(k, (0, 0))[0] for k, c in kinds.items())]
        sent += [sum(c.bytes - before.get(k, (0, 0))[1] for k, c in kinds.items())]
        return str(error), sent, not attributes.others()
    return "", [], False


def in_bf16(name: str) -> dict[str, tuple[float, float]]:
    """By method: the error of bf16 against fp32 on one process, and over ranks."""
    case = case_named(name)
    module = cases.build(case)
    found: dict[str, tuple[float, float]] = {}
    for method, (run, inputs) in METHODS.items():
        x = inputs(case, odd=True)
        exact = run(case, module.float(), x)
        whole = run(case, module.bfloat16(), x.bfloat16()).float()
        handle = shard(module)
        shared = run(case, module, x.bfloat16())
        assert shared.dtype == torch.bfloat16
        handle.remove()
        found[method] = relative(whole, exact), relative(shared.float(), exact)
    return found


def distributions() -> list[float]:
    """What encode gives: a distribution of whole plain tensors, whose sample and mode are those of one process."""
    case = case_named("AutoencoderKL")
    module = cases.build(case)
    x = cases.picture(case)
    with torch.no_grad():
        want = module.encode(x).latent_dist
        handle = shard(module)
        got = module.encode(x).latent_dist
        as_tuple = module.encode(x, return_dict=False)[0]
    handle.remove()
    found = [
        relative(getattr(got, name), getattr(want, name)) for name in ("parameters", "mean", "logvar", "std", "var")
    ]
    samples = [d.sample(torch.Generator().manual_seed(2)) for d in (got, as_tuple, want)]
    return [
        *found,
        relative(samples[0], samples[2]),
        relative(samples[1], samples[2]),
        relative(got.mode(), want.mode()),
    ]


def in_pairs() -> float:
    """Four ranks as two groups, each with latents of its own."""
    groups: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    case = case_named("AutoencoderKL")
    module = cases.build(case)
    x = cases.latents(case, seed=mine)
    want = cases.decode(case, module, x)
    handle = ShardedAutoencoder("vae", module, groups[mine])
    handle.install()
    error = relative(cases.decode(case, module, x), want)
    handle.remove()
    return error


def with_gradients() -> str:
    case = case_named("AutoencoderKL")
    module = cases.build(case)
    shard(module)
    try:
        module.decode(cases.latents(case).requires_grad_())
    except ParafuseError as error:
        return str(error)
    return "no error"


PICTURE: dict[str, Any] = dict(
    block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4, layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    mid_block_add_attention=False,
)  # fmt: skip
LARGE: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "picture decode": ("AutoencoderKL", PICTURE, "decode", (1, 4, 96, 96)),
    "picture encode": ("AutoencoderKL", PICTURE, "encode", (1, 3, 192, 192)),
    "video decode": ("AutoencoderKLWan", dict(case_named("AutoencoderKLWan").config), "decode", (1, 4, 3, 48, 32)),
    "sound decode": ("AutoencoderOobleck", dict(case_named("AutoencoderOobleck").config), "decode", (1, 4, 4096)),
}
"""Class, configuration, method and input, so large that weights do not count."""


def peaks(names: list[str]) -> dict[str, tuple[int, int]]:
    """Of each of LARGE the most bytes of storages that were alive at one time on this rank: all that operators made
    (the result with it), and the weights beside."""
    from diffusers.models import autoencoders

    found: dict[str, tuple[int, int]] = {}
    for name in names:
        kind, config, method, shape = LARGE[name]
        torch.manual_seed(0)
        module = getattr(autoencoders, kind)(**config).eval()
        handle = shard(module) if dist.get_world_size() > 1 else None
        ledger = Ledger()
        with torch.no_grad(), ledger:
            getattr(module, method)(torch.randn(shape), return_dict=False)
        if handle:
            handle.remove()
        found[name] = ledger.peak("start").nbytes, sum(p.nbytes for p in module.parameters())
    return found
