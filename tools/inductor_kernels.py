"""Counts the Triton kernels that torch.compile would make for an H200, on a machine without a GPU: code is generated,
never compiled or run. It pretends that a device exists, so it is a script of its own, and needs the `triton` package.

    python tools/inductor_kernels.py            # every case, with and without the rewrite `rope`
    python tools/inductor_kernels.py flux1      # those whose names have this in them; --show: each kernel's name
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._triton as has
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152, L2_cache_size=60 << 20, gcnArchName="", max_threads_per_block=1024,
    clock_rate=1980000,
)  # fmt: skip


_GPU = torch.device("cuda:0")


@dataclass(frozen=True)
class Kernels:
    """What a graph becomes."""

    triton: tuple[str, ...]
    """Kernels that are launched, in order."""
    extern: Counter[str]
    """Calls of libraries and operators."""
    made_bytes: int
    """Of the buffers that are allocated: what is written and read again beside what the model needs grows them."""
    moved_bytes: int
    """Read and written by all Triton kernels, each of a kernel's buffers once."""


def pretend() -> None:
    """Makes this process look as if it had one H200."""
    compiler: Any = importlib.import_module("triton.backends.compiler")  # a package that is not always there
    driver: Any = importlib.import_module("triton.runtime").driver

    target = SimpleNamespace(
        get_current_target=lambda: compiler.GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}),
    )
    driver.set_active(target)
    constants: dict[Any, dict[str, Any]] = {
        CudaInterface: dict(
            is_available=True, current_device=0, device_count=1, get_device_properties=H200,
            get_compute_capability=90, is_bf16_supported=True, is_triton_capable=True,
            raise_if_triton_unavailable=None,
        ),
        CudaInterface.Worker: dict(get_device_properties=H200, current_device=0),
        torch.cuda: dict(
            is_available=True, device_count=1, current_device=0, get_device_properties=H200,
            get_device_capability=(9, 0), _lazy_init=None, is_initialized=True, init=None,
        ),
        has: dict(has_triton=True, has_triton_package=True, triton_hash_with_backend="none"),
    }  # fmt: skip
    for holder, values in constants.items():
        for name, value in values.items():
            function: Any = lambda *_, value=value, **__: value  # noqa: E731
            setattr(holder, name, staticmethod(function) if isinstance(holder, type) else function)
    for name, module in list(sys.modules.items()):  # that took the function before
        if name.startswith("torch._") and "has_triton" in vars(module):
            vars(module)["has_triton"] = has.has_triton


def capture(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The graph of one call under `torch.compile(fullgraph=True, options=options)`, as Inductor's lowering gets it, and
    its inputs. Module and arguments are fake tensors."""
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def taken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with config.patch(options), V.set_fake_mode(_mode_of(inputs)):
            joint_graph_passes(graph)
            post_grad_passes(graph, is_inference=True)
        found.append((graph, inputs))
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        taker: Any = taken
        return aot_module_simplified(
            graph, inputs, fw_compiler=taker, inference_compiler=taker, decompositions=select_decomp_table()
        )

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found[0]


def kernels(graph: torch.fx.GraphModule, inputs: list[Any]) -> Kernels:
    """What Inductor makes of a captured graph. In a process that pretends."""

    def on_gpu(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_GPU)

    mode = _mode_of(inputs)
    with V.set_fake_mode(mode), mode:
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(on_gpu, node.meta["val"])
            node.kwargs = {
                k: torch.device("cuda:0") if isinstance(v, torch.device) else v for k, v in node.kwargs.items()
            }
        graph.recompile()
        lowered = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(lowered), V.set_debug_handler(mock.MagicMock()):
            lowered.run(*map(on_gpu, inputs))
            code: Any = lowered.codegen()[0]
    text: str = getattr(code, "value", code)
    if "--keep" in sys.argv:
        with open("generated_code.txt", "w") as file:  # noqa: PTH123
            file.write(text)
    return _read(text)


def _mode_of(inputs: list[Any]) -> FakeTensorMode:
    return next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))


def _read(text: str) -> Kernels:
    """From the code that Inductor wrote."""
    launched = re.findall(r"^\s+(triton_\w+)\.run\((.*)\)$", text, re.MULTILINE)
    extern = re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", text)
    sizes = {
        name: math.prod(eval(shape)) * _itemsize(dtype)
        for name, shape, dtype in re.findall(
            r"(\w+) = empty_strided_cuda\((\([^)]*\)), \([^)]*\), torch\.(\w+)\)", text
        )
    }
    made = sum(sizes.values())
    for new, old in re.findall(r"^\s+(\w+) = (\w+); del \2", text, re.MULTILINE):
        sizes[new] = sizes.get(old, 0)
    for new, old, shape in re.findall(r"(\w+) = reinterpret_tensor\((\w+), (\([^)]*\))", text):
        whole = sizes.get(old, 0)
        sizes[new] = whole and min(whole, math.prod(eval(shape)) * 2)
    moved = sum(sizes.get(name.strip(), 0) for _, args in launched for name in args.split(","))
    return Kernels(tuple(name for name, _ in launched), Counter(extern), made, moved)


def _itemsize(name: str) -> int:
    return getattr(torch, name).itemsize


@dataclass(frozen=True)
class Case:
    """A block of a diffusers model at its published size, without weights."""

    module: str
    name: str
    sizes: tuple[Any, ...]
    """Of the constructor."""
    inputs: Callable[[], tuple[Any, ...]]


def _of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _tables(tokens: int) -> tuple[Tensor, Tensor]:
    return _of(tokens, 128, dtype=torch.float32), _of(tokens, 128, dtype=torch.float32)


def _joint(image: int, text: int, width: int, *more: Tensor) -> tuple[Any, ...]:
    return _of(1, image, width), _of(1, text, width), *(more or (_of(1, width),))


def _six(width: int) -> tuple[Tensor, Tensor]:
    return _of(1, 1, 6 * width), _of(1, 1, 6 * width)


DIFFUSERS = "diffusers.models.transformers.transformer_"
CASES = {
    "flux1 double": Case(DIFFUSERS + "flux", "FluxTransformerBlock", (3072, 24, 128),
        lambda: (*_joint(4096, 512, 3072), _tables(4608))),
    "flux1 single": Case(DIFFUSERS + "flux", "FluxSingleTransformerBlock", (3072, 24, 128),
        lambda: (*_joint(4096, 512, 3072), _tables(4608))),
    "flux2 double": Case(DIFFUSERS + "flux2", "Flux2TransformerBlock", (6144, 48, 128),
        lambda: (*_joint(4096, 512, 6144, *_six(6144)), _tables(4608))),
    "flux2 single": Case(DIFFUSERS + "flux2", "Flux2SingleTransformerBlock", (6144, 48, 128),
        lambda: (_of(1, 4608, 6144), None, _of(1, 1, 3 * 6144), _tables(4608))),
    "bria double": Case(DIFFUSERS + "bria", "BriaTransformerBlock", (3072, 24, 128),
        lambda: (*_joint(4096, 128, 3072), _tables(4224))),
    "longcat double": Case(DIFFUSERS + "longcat_image", "LongCatImageTransformerBlock", (3072, 24, 128),
        lambda: (*_joint(4096, 512, 3072), _tables(4608))),
    "qwen image": Case(DIFFUSERS + "qwenimage", "QwenImageTransformerBlock", (3072, 24, 128),
        lambda: (_of(1, 4096, 3072), _of(1, 512, 3072), None, _of(1, 3072),
                 (_of(4096, 64, dtype=torch.complex64), _of(512, 64, dtype=torch.complex64)))),
    "hunyuan video double": Case(DIFFUSERS + "hunyuan_video", "HunyuanVideoTransformerBlock", (24, 128, 4.0),
        lambda: (*_joint(4096, 256, 3072), None, _tables(4096))),
    "hunyuan video single": Case(DIFFUSERS + "hunyuan_video", "HunyuanVideoSingleTransformerBlock", (24, 128, 4.0),
        lambda: (*_joint(4096, 256, 3072), None, _tables(4096))),
    "sd3.5": Case("diffusers.models.attention", "JointTransformerBlock", (2432, 38, 64, False, "rms_norm"),
        lambda: _joint(4096, 333, 2432)),
}  # fmt: skip
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "as it is": dict,
    "rope order": lambda: {"post_grad_custom_pre_pass": _rope_order()},
    "force_pointwise_cat": lambda: {"force_pointwise_cat": True},
    "no pointwise cat": lambda: {"max_complex_pointwise_cat_inputs": 0, "max_pointwise_cat_inputs": 0},
    "combo_kernels": lambda: {"combo_kernels": True},
    "rope order, combo_kernels": lambda: {"post_grad_custom_pre_pass": _rope_order(), "combo_kernels": True},
}
"""Options of one compile call."""


def _rope_order() -> Any:
    from parafuse.kernels.graph_passes.rope_order import RopeOrder

    return RopeOrder()


def main(names: list[str], *, shows: bool) -> None:
    """Prints a line for each case and way."""
    cases = {name: case for name, case in CASES.items() if not names or any(part in name for part in names)}
    classes = {name: getattr(importlib.import_module(case.module), case.name) for name, case in cases.items()}
    graphs: dict[tuple[str, str], tuple[torch.fx.GraphModule, list[Any], dict[str, Any]]] = {}
    for name, case in cases.items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(torch.bfloat16)
            block: nn.Module = classes[name](*case.sizes).eval()
            torch.set_default_dtype(torch.float32)
            for way, options in WAYS.items():
                given = options()
                graphs[name, way] = (*capture(block, case.inputs(), given), given)
    pretend()
    for (name, way), (graph, inputs, options) in graphs.items():
        own = {key: value for key, value in options.items() if "custom" not in key}
        with config.patch({**own, "fx_graph_cache": False}):
            found = kernels(graph, inputs)
        print(f"{name:22s} {way:26s} {len(found.triton):3d} Triton kernels, {found.moved_bytes / 1e6:6.0f} MB moved")
        if shows:
            print("".join(f"    {kernel}\n" for kernel in found.triton), end="")


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--")], shows="--show" in sys.argv)
