"""`Config(compile=True)`: at most two graphs for a class of blocks, whatever varies from call to call, and the same
results in every combination."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import parafuse
from parafuse.engine.devices import remove_offload
from parafuse.errors import UnsupportedError
from parafuse.parallel import tiers
from tests.caches.steps import later, letters
from tests.caches.test_token_merging import unet, unet_inputs
from tests.dist.ranks import run_ranks
from tests.dist.test_compile import ByValue
from tests.dist.test_refused_blocks import Stack
from tests.dist.test_sequence import attempt
from tests.models import EVEN, ODD, Sizes, build, call, error, inputs
from tests.unit.test_probe_refusals import D, Good

EXACT = 1e-5
SIZES = {
    "first": ODD,
    "again": ODD,
    "other picture": Sizes(grid=(1, 4, 7)),
    "other prompt": Sizes(text=9),
    "third picture": EVEN,
    "third prompt": Sizes(text=21),
    "few tokens": Sizes(grid=(1, 1, 5), text=4),
}


def config(layout: dict[str, int], **more: Any) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(**layout), compile=True, **more)


def tally(handle: parafuse.Handle) -> Counter[str]:
    """Graphs by class."""
    return sum((one.tally.graphs for one in handle.compiled.values()), Counter[str]())


def over_sizes(
    family: str, layout: dict[str, int], batch: int = 2, backend: str = "aot_eager"
) -> tuple[dict[str, float], Counter[str]]:
    torch.compiler.reset()
    model = build(family)
    calls = {name: inputs(family, replace(sizes, batch=batch)) for name, sizes in SIZES.items()}
    want = {name: call(model, values) for name, values in calls.items()}
    with mock.patch.object(tiers, "BACKEND", backend), parafuse.apply(model, config(layout)) as handle:
        found = {name: error(call(model, values), want[name]) for name, values in calls.items()}
        return found, tally(handle)


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    ("family", "layout", "batch"),
    [("flux", {}, 1), ("weaver", dict(ulysses=2), 2), ("wan", dict(ring=2, ulysses=1), 2)],
)
def test_two_graphs_serve_all_prompts_and_resolutions(family: str, layout: dict[str, int], batch: int) -> None:
    size = math.prod(layout.values())
    given = (family, layout, batch)
    for errors, graphs in run_ranks(over_sizes, size, *given, timeout_s=200) if size > 1 else [over_sizes(*given)]:
        assert max(errors.values()) <= EXACT
        assert set(graphs.values()) == {2}


@pytest.mark.whole
def test_two_graphs_serve_all_weights_of_an_adapter() -> None:
    for found in run_ranks(with_adapters, 2, dict(ulysses=2), timeout_s=200):
        assert max(wrong for wrong, _, _ in found.values()) <= EXACT
        assert min(moved for _, moved, _ in found.values()) > 0.1
        assert found["loaded"][2] == 2  # the blocks are others now
        assert [found[name][2] for name in ADAPTERS if name not in ("loaded", "taken off")] == [0] * 4


def adapter(model: nn.Module, *, seed: int, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA for the blocks' projections, in peft's format."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for path, part in model.named_modules():
        name = path.replace(".base_layer", "")
        if isinstance(part, nn.Linear) and ".lora_" not in name and name.endswith(("to_q", "to_v", "net.2")):
            found[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, part.in_features, generator=generator)
            found[f"{name}.lora_B.weight"] = 0.3 * torch.randn(part.out_features, rank, generator=generator)
    return found


ADAPTERS: dict[str, Any] = {
    "loaded": lambda model: model.load_lora_adapter(adapter(model, seed=1), adapter_name="a", prefix=None),
    "scaled": lambda model: model.set_adapters("a", 0.3),
    "scaled again": lambda model: model.set_adapters("a", 2.5),
    "other weights": lambda model: [x.mul_(1.5) for name, x in model.named_parameters() if ".lora_B." in name],
    "replaced": lambda model: [
        model.delete_adapters("a"),
        model.load_lora_adapter(adapter(model, seed=2), adapter_name="a", prefix=None),
    ],
    "taken off": lambda model: model.unload_lora(),
}


def with_adapters(layout: dict[str, int]) -> dict[str, tuple[float, float, int]]:
    """Change -> (error, how much the result moved, graphs made for it) of a model that is compiled without any."""
    torch.compiler.reset()
    plain, model = build("wan"), build("wan")
    values, other = inputs("wan", ODD), inputs("wan", EVEN)
    found = {}
    with (
        mock.patch.object(tiers, "BACKEND", "aot_eager"),
        parafuse.apply(model, config(layout)) as handle,
        torch.no_grad(),
    ):
        call(model, values)
        before, made = call(plain, values), tally(handle).total()
        for name, change in ADAPTERS.items():
            change(plain)
            change(model)
            want = call(plain, values)
            wrong = max(error(call(model, values), want), error(call(model, other), call(plain, other)))
            found[name] = (wrong, error(want, before), tally(handle).total() - made)
            before, made = want, tally(handle).total()
    return found


STEPS = 7
COMBINATIONS: list[tuple[str, dict[str, int], str, str]] = [
    ("flux", {}, "", ""),
    ("flux", dict(ulysses=2), "", ""),
    ("wan", dict(ring=2), "", ""),
    ("weaver", dict(cfg=2, ulysses=1), "", ""),
    ("unet", dict(data=2, ulysses=1), "", ""),
    ("flux", {}, "interval:2", ""),
    ("flux", dict(ulysses=2), "first-block:0.3", ""),
    ("wan", dict(cfg=2, ulysses=1), "interval:2", ""),
    ("wan", {}, "pab:2,2,2", ""),
    ("wan", dict(ulysses=2), "fora:2", ""),
    ("unet", {}, "interval:2", ""),
    ("unet", {}, "tgate:4", ""),
    ("unet", {}, "token-merging:0.5", ""),
    ("flux", dict(ulysses=2), "", "int8"),
    ("flux", {}, "interval:2", "int8"),
    ("unet", {}, "", "model offload"),
    ("flux", {}, "", "group offload"),
    ("weaver", dict(ulysses=2), "", "group offload"),
]
"""Model, layout, cache, and what else is done to it."""


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "unet":
        return unet(), unet_inputs(2)
    return build(name), inputs(name, ODD)


def offload(model: nn.Module, more: str) -> None:
    """From this device to itself."""
    cpu = torch.device("cpu")
    if more == "group offload":
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
        )
    elif more == "leaf offload":
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    elif more == "model offload":
        cpu_offload_with_hook(model, cpu)


def stepping(model: nn.Module, asked: parafuse.Config, values: dict[str, Any], more: str = "") -> dict[str, Any]:
    """What some steps of one request give."""
    graphs: list[int] = []
    with parafuse.apply(model, asked) as handle, torch.no_grad(), handle.request() as memories:
        offload(model, more)
        outputs: list[Tensor] = []
        for step in range(STEPS):
            outputs.append(tree_leaves(model(**later(values, step)))[0].clone())
            graphs.append(tally(handle).total())
        decisions = [letters(memory) for memory in memories.values()]
        found = {"outputs": outputs, "decisions": decisions, "graphs": graphs, "classes": tally(handle)}
        remove_offload(model)
    return found


def combination(name: str, layout: dict[str, int], cache: str, more: str, backend: str) -> tuple[float, list[int], Any]:
    """(difference from the same uncompiled, graphs after each step, what the cache decided in both)."""
    torch.compiler.reset()
    found: list[dict[str, Any]] = []
    for compiled in (False, True):
        model, values = made(name)
        if more == "int8":
            quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
        asked = replace(config(layout, cache=cache or None), compile=compiled)
        with mock.patch.object(tiers, "BACKEND", backend):
            found.append(stepping(model, asked, values, more))
    plain, got = found
    wrong = max(map(error, got["outputs"], plain["outputs"]))
    return wrong, got["graphs"], (plain["decisions"], got["decisions"])


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(("name", "layout", "cache", "more"), COMBINATIONS)
def test_combined(name: str, layout: dict[str, int], cache: str, more: str) -> None:
    size = max(1, math.prod(layout.values()))
    given = (name, layout, cache, more, "eager")
    for wrong, graphs, (plain, got) in run_ranks(combination, size, *given) if size > 1 else [combination(*given)]:
        assert wrong <= EXACT
        assert graphs[-1] > 0
        assert graphs[-1] == graphs[4]
        assert got == plain


def with_parts_offloaded() -> str:
    model, values = made("flux")
    with parafuse.apply(model, config({})), torch.no_grad():
        offload(model, "leaf offload")
        found = attempt(lambda: model(**values))
        remove_offload(model)
    return found


def test_what_is_not_one_graph_is_refused_by_name() -> None:
    torch.compiler.reset()
    found = with_parts_offloaded()
    assert "FluxTransformerBlock: cannot be compiled under parafuse" in found
    assert "offload whole blocks or components, not their parts" in found


def of_values() -> list[str]:
    torch.compiler.reset()
    model = Stack(ByValue(), Good())
    x = torch.randn(2, 11, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), parafuse.apply(model, config(dict(ulysses=2) if dist.is_initialized() else {})):
        return [attempt(model, x)]


def test_a_model_without_blocks_is_refused_before_anything_is_changed() -> None:
    with pytest.raises(UnsupportedError, match="no block stack found"):
        parafuse.apply(nn.Linear(2, 2), config({}))


def test_all_ranks_refuse_it_alike() -> None:
    for found in (*run_ranks(of_values, 2), of_values()):
        assert found[0].startswith("UnsupportedError: ByValue: ")


def without_compile() -> tuple[int, str]:
    """(graphs of blocks that the option does not compile, what a compile of the whole says where it does)."""
    torch.compiler.reset()
    model, values = made("flux")
    with parafuse.apply(model, parafuse.Config(cache="interval:2")) as handle:
        call(model, values)
        none = tally(handle).total()
    with parafuse.apply(model, config({})) as handle:
        kinds = "2 FluxTransformerBlock, 2 FluxSingleTransformerBlock"
        assert handle.applied == [f"compiled blocks on FluxTransformer2DModel: {kinds}"]
        said = attempt(model.compile)
    assert not any({"forward", "compile"} & set(vars(part)) for part in model.modules())
    return none, said


def test_it_is_said_and_taken_off() -> None:
    none, said = without_compile()
    assert none == 0
    assert "its repeated blocks are compiled already" in said


def one_name(folder: str, wait: float) -> list[tuple[bool, float]]:
    """Whether each rank got a name that rank 1 holds for half a second, and how long it waited."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    try:
        if dist.get_rank() == 1:
            with tiers.one_at_a_time("x") as has_it:
                dist.barrier()
                time.sleep(0.5)
            dist.barrier()
            return [(has_it, 0.0)]
        dist.barrier()
        begun = time.monotonic()
        with tiers.one_at_a_time("x", wait) as has_it:
            waited = time.monotonic() - begun
        dist.barrier()
        return [(has_it, waited)]
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        os.environ |= {} if before is None else {"TORCHINDUCTOR_CACHE_DIR": before}


@pytest.mark.parametrize(("longest", "gets_it"), [(60.0, True), (0.1, False)])
def test_ranks_wait_for_one_that_compiles_but_not_for_ever(tmp_path: Path, longest: float, gets_it: bool) -> None:
    first, second = run_ranks(one_name, 2, str(tmp_path), longest)
    assert second[0][0]
    assert first[0][0] is gets_it
    assert (first[0][1] > 0.3) is gets_it


def test_where_nothing_can_be_locked_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    begun = time.monotonic()
    with tiers.one_at_a_time("x", 20.0) as has_it:
        assert not has_it
    assert time.monotonic() - begun < 10
