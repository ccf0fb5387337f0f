"""What a rank does in the tests of loading, and a checkpoint of any size."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parafuse.config import Config
from parafuse.engine.node_loading import host_memory, import_classes, load_for_ranks
from parafuse.engine.planner import resolve
from parafuse.engine.source import EMBEDDED, locate
from parafuse.parallel.world import join_world


def emoji_in(folder: Path) -> Path:
    """A copy of emoji, to break."""
    return Path(shutil.copytree(EMBEDDED / "emoji", folder / "emoji"))


def checkpoint(folder: Path, nbytes: int, dtype: torch.dtype) -> Path:
    """emoji with a transformer that has about so many bytes in this dtype. Each of its tensors has one value."""
    import diffusers

    there = emoji_in(folder)
    config: Any = diffusers.FluxTransformer2DModel.load_config(there / "transformer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    each = 15 * width * width * dtype.itemsize  # of a block of one stream, nearly
    layers = config | {"num_single_layers": max(1, nbytes // each)}
    with torch.device("meta"):
        model: Any = diffusers.FluxTransformer2DModel.from_config(layers)
        model.to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(0.01 + i * 1e-5)
    shutil.rmtree(there / "transformer")
    model.save_pretrained(there / "transformer", max_shard_size="200MB")
    return there


def load(folder: str, **config: Any) -> dict[str, Any]:
    """Loads it on this rank; what that took, and a hash of all weights, which touches every page of them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    source = locate(folder)
    plan = resolve(Config(device="cpu", **config), source, size)
    world = join_world("cpu", 60.0, size)
    settings = {"plan": plan, "pipeline_kwargs": {}, "allow_pickle": False}
    begun = time.monotonic()
    try:
        import_classes(source)
        gc.collect()
        imported = host_memory()["proportional_bytes"]
        loaded = load_for_ranks(source, settings, world)
        print("loaded", file=sys.stderr)
    except BaseException:
        world.broken = True
        raise
    parts = {name: part for name, part in loaded.pipeline.components.items() if isinstance(part, nn.Module)}
    found = {name: digest(part) for name, part in parts.items()}
    gc.collect()
    world.everyone("read", "")
    share = host_memory()["proportional_bytes"] - imported
    world.everyone("measured", "")
    world.leave()
    return {"weights": found, "share": share, "seconds": time.monotonic() - begun, "ranks": loaded.ranks}


def digest(part: nn.Module) -> str:
    """Of all values, by name."""
    found = hashlib.sha256()
    for name, x in sorted(part.state_dict().items()):
        inner = [getattr(x, n) for n in x.__tensor_flatten__()[0]] if hasattr(x, "__tensor_flatten__") else [x]
        for one in inner:
            found.update(name.encode())
            found.update(one.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
