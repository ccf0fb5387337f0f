"""diffusers' guides with parafuse in the place of their parallel parts: the pictures of plain diffusers on one rank."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate import PartialState

import parafuse
from tests.dist.ranks import run_ranks

GUIDES = Path(__file__).resolve().parents[2] / "examples" / "guides"
EMOJI = Path(parafuse.__file__).parent / "models" / "emoji"
STEPS, SIZE = 2, 64
SMALL: dict[str, Any] = {"steps": STEPS, "size": SIZE}
VIDEO: dict[str, Any] = SMALL | {"model": "tiny:hunyuanvideo", "frames": 9, "runs": 1}
ELSEWHERE = ("sequential_offload", "attention")
"""The first one diffusers itself cannot do on a CPU; the other is in the guide of context parallelism too."""


def guide(name: str) -> Any:
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(f"guide_{name}", GUIDES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, out: Path, calls: list[dict[str, Any]]) -> list[Any]:
    """What a script's `main` gives for each call, on this rank; pictures as arrays."""
    main, to = guide(name).main, out if name.endswith("_prompts") else out / f"{name}.png"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # accelerate wants to see them; the ranks have met
    try:
        with patch.dict(os.environ, address):
            return [pixels(main(out=to, **call)) for call in calls]
    finally:
        PartialState._reset_state()


def pixels(found: Any) -> Any:
    return [pixels(one) for one in found] if isinstance(found, list) else np.asarray(found).astype(int)


def plain() -> Any:
    """diffusers' own pipeline of the embedded model."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def painted(pipeline: Any, prompt: Any, seed: Any, **more: Any) -> Any:
    """Pictures by plain diffusers, with the defaults of the embedded model, whose ranks have no say."""
    call = json.loads((EMOJI / "parafuse.json").read_text())["call"]
    call |= {"num_inference_steps": STEPS, "width": SIZE, "height": SIZE} | more
    if isinstance(prompt, list):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompt)
    seeds: Iterable[int] = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    return pixels(pipeline(prompt, generator=generators if isinstance(seed, list) else generators[0], **call).images)


def apart(got: Any, want: Any) -> int:
    """Largest difference of a pixel, of 255."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    return int(np.abs(got - want).max())


def test_prompts_split_between_processes(tmp_path: Path) -> None:
    """Each rank alone is plain diffusers, bit for bit."""
    pipeline = plain()
    want = [painted(pipeline, prompt, 0)[0] for prompt in ("a dog", "a cat", "a red apple")]
    first, second = (one[0] for one in run_ranks(run, 2, "split_prompts", tmp_path, [SMALL]))
    assert (apart(first, want[:2]), apart(second, want[2:])) == (0, 0)
    assert apart(want[0], want[1]) > 1, "control: the prompts differ"
    assert len(list(tmp_path.glob("result_*.png"))) == 3
    (together,) = run_ranks(run, 2, "all_prompts", tmp_path, [SMALL])[1]
    assert apart(together, painted(pipeline, ["a dog", "a cat"], [0, 1])) <= 1
    assert sorted(path.name for path in tmp_path.glob("a_*.png")) == ["a_cat.png", "a_dog.png"]


def test_one_picture_by_all_ranks(tmp_path: Path) -> None:
    calls = [SMALL | {"ring": 2}, SMALL | {"ring": 1, "ulysses": 2}]
    want = painted(plain(), "a red apple", 42)[0]
    for found in run_ranks(run, 2, "context_parallel", tmp_path, calls):
        assert [apart(one, want) <= 1 for one in found] == [True, True]
    assert (tmp_path / "context_parallel.png").is_file()


def test_stages_of_a_picture(tmp_path: Path) -> None:
    want = painted(plain(), "a red apple", 0)[0]
    for (found,) in run_ranks(run, 2, "staged", tmp_path, [SMALL]):
        assert apart(found, want) <= 1
    assert apart(run("staged", tmp_path, [SMALL])[0], want) == 0, "one rank"


def test_savings_of_memory(tmp_path: Path) -> None:
    module = guide("memory")
    savings = [name for name in module.SAVINGS if name not in ELSEWHERE]
    calls = [SMALL | {"steps": 1, "saving": name} for name in savings]
    found = run_ranks(run, 2, "memory", tmp_path, calls, timeout_s=120)
    whole = None
    for name, first, second in zip(savings, *found, strict=True):
        pipeline = plain()
        module.SAVINGS[name](pipeline)
        want = painted(pipeline, ["a red apple", "a rocket"], 0, num_inference_steps=1)
        assert max(apart(first, want), apart(second, want)) <= 1, name
        whole = want if whole is None else whole
        assert (apart(want, whole) > 1) == (name == "layerwise_casting"), f"{name}: control"


@pytest.mark.whole
def test_the_guide_of_para_attention(tmp_path: Path) -> None:
    flux = SMALL | {"runs": 1}
    calls = [flux, flux | {"backend": "aot_eager", "runs": 2}, VIDEO]
    want = run("para_attn", tmp_path / "alone", [flux, VIDEO])
    for uncompiled, compiled, video in run_ranks(run, 2, "para_attn", tmp_path, calls, timeout_s=180):
        assert max(apart(uncompiled, want[0]), apart(compiled, want[0]), apart(video, want[1])) <= 1
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["para_attn.gif", "para_attn.png"]
    pipeline = plain()
    generator = torch.Generator().manual_seed(0)
    sizes = dict(width=SIZE, height=SIZE, max_sequence_length=16, num_inference_steps=STEPS)
    bare = pipeline("A cat walks on the grass, realistic", generator=generator, **sizes).images[0]
    assert apart(pixels(bare), want[0]) == 0, "what is compared with is plain diffusers"
