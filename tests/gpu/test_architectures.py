"""Architectures without weights are built on the GPU: no copy on the CPU, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parafuse.engine.architecture import architectures
from parafuse.engine.loader import load_pipeline
from parafuse.engine.source import locate

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("name", architectures())
def test_a_tiny_form_is_built_on_the_gpu_and_paints(name: str) -> None:
    source = locate(f"tiny:{name}")
    state, default = torch.cuda.get_rng_state(CUDA), torch.get_default_dtype()
    pipeline = load_pipeline(source, dtype="bfloat16", allow_pickle=False, device=CUDA)
    assert torch.equal(torch.cuda.get_rng_state(CUDA), state)
    assert torch.get_default_dtype() == default
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    before = [[p.data_ptr() for p in part.parameters()] for part in parts]
    assert all(p.device == CUDA for part in parts for p in (*part.parameters(), *part.buffers()))
    pipeline.to(CUDA)
    assert [[p.data_ptr() for p in part.parameters()] for part in parts] == before
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipeline(prompt="a red apple", generator=generator, output_type="pt", return_dict=False, **source.defaults)
    assert output[0].isfinite().all()
    assert output[0].std() > 0.1


def test_no_more_memory_than_the_weights_need() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    pipeline = load_pipeline(locate("random:sdxl"), dtype="bfloat16", allow_pickle=False, device=CUDA)
    sizes = sum(
        p.nbytes for part in pipeline.components.values() if isinstance(part, nn.Module) for p in part.parameters()
    )
    assert (
        torch.cuda.max_memory_allocated(CUDA) - before < 1.05 * sizes + 2**29
    )  # values are drawn in pieces of 256 MiB
