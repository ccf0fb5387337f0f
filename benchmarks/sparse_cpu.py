"""Work skipped against time saved: a video transformer with sparse attention against itself, on one CPU thread.

`python -m benchmarks.sparse_cpu`: Wan of width 256 over 12 x 16 x 16 tokens, in one process in turns, processor time of
each call, medians. Beside the time stands what the density predicts: the share of attention in the whole call, times
what is left of it. Figures: docs/notes/sparse.md.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

import parafuse

ROUNDS = 7
FIELDS = "dense_steps=0,dense_layers=0"
METHODS = ("window:4,8,8", "window:2,4,4", "radial:0.25", "content:keep=0.25", "content:0.7")


def model() -> Any:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=1024, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval().requires_grad_(False)  # fmt: skip


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 12, 32, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 64, generator=generator),
    }


def attention_s() -> float:
    """The video's attention of the two layers alone."""
    q = torch.randn(1, 4, 12 * 16 * 16, 64)
    return 2 * statistics.median(_seconds(lambda: F.scaled_dot_product_attention(q, q, q)) for _ in range(ROUNDS))


def _seconds(run: Any) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    values, models = inputs(), {name: model() for name in ("whole", *METHODS)}
    handles = {name: parafuse.apply(models[name], parafuse.Config(sparse=f"{name},{FIELDS}")) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    results: dict[str, Any] = {}
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            for name, one in models.items():
                begun = time.process_time()
                results[name] = one(**values).sample
                if turn >= 2:  # the first ones find out grids
                    seconds[name].append(time.process_time() - begun)
        share = attention_s() / statistics.median(seconds["whole"])
    whole = statistics.median(seconds["whole"])
    print(f"whole: {whole * 1e3:.0f} ms, of that the video's attention {share:.0%}")
    for name in METHODS:
        report = handles[name].sparse()[type(models[name]).__name__].attention.report() or {}
        density = report["density"]
        found, predicted = statistics.median(seconds[name]) / whole, 1 - share * (1 - density)
        loss = float((results[name] - results["whole"]).norm() / results["whole"].norm())
        print(f"{name:18} density {density:.2f}: time {found:.2f} of whole, predicted {predicted:.2f}; loss {loss:.3f}")


if __name__ == "__main__":
    main()
