"""Another pipeline over the components of one, whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from parafuse.engine.state import components_of


def pipeline_over(pipeline: Any, pipeline_class: Any, kwargs: dict[str, Any]) -> Any:
    """diffusers' `from_pipe`, without its cast of all components to one dtype (float32 where none is given), unless a
    dtype is asked for. Local."""
    if {"dtype", "torch_dtype"} & kwargs.keys():
        made = pipeline_class.from_pipe(pipeline, **kwargs)
    else:
        with _kept(pipeline, kwargs):
            made = pipeline_class.from_pipe(pipeline, dtype=pipeline.dtype, **kwargs)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def _kept(pipeline: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Parameters and buffers that get other data meanwhile have their own again afterwards."""
    parts = [*components_of(pipeline).values(), *kwargs.values()]
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    parameters = [(p, p.data, p.dtype) for module in modules for p in module._parameters.values() if p is not None]
    quantized: list[Any] = [module for module in modules if "is_quantized" in vars(module)]
    for module in quantized:
        module.is_quantized = False  # diffusers refuses to cast it; what it casts is put back
    buffers: list[tuple[dict[str, Any], str, Tensor]] = [
        (module._buffers, name, x) for module in modules for name, x in module._buffers.items() if x is not None
    ]
    try:
        yield
    finally:
        for module in quantized:
            module.is_quantized = True
        for parameter, data, dtype in parameters:
            if parameter.dtype != dtype:
                parameter.data = data
        for holder, name, x in buffers:
            holder[name] = x
