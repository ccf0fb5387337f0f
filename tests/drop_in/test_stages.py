"""Encode, denoise and decode as steps of their own, with memory freed between; and ranks that run alone."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import parafuse
from parafuse.errors import ConfigError, RankMismatchError
from tests.dist.ranks import run_ranks
from tests.drop_in.test_guides import plain

NO_TEXT: dict[str, Any] = dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
CALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64}
PROMPT = "a red apple"
TWO = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))


def closed(engine: parafuse.Engine) -> dict[str, Any]:
    """Closes it; weak references to what it held, by name."""
    engine.close()
    parts = {name: part for name, part in engine.pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: weakref.ref(x) for name, x in (parts | {"pipeline": engine.pipeline, "engine": engine}).items()}


def alive(held: dict[str, Any]) -> list[str]:
    """Names of what lives on."""
    gc.collect()
    return [name for name, one in held.items() if one() is not None]


@torch.no_grad()
def encode(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Embeddings by an engine of text encoders alone, and what of it lives on."""
    engine = parafuse.Engine.from_pretrained("emoji", config, transformer=None, vae=None)
    positive, negative = (engine.encode_prompt(prompt=t, prompt_2=None, max_sequence_length=16) for t in (PROMPT, ""))
    held = closed(engine)
    assert "engine" in alive(held), "control"
    del engine
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, (*positive[:2], *negative[:2]), strict=True)), alive(held)


def denoise(config: Any, embeds: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Latents with and without guidance, what was applied, and what of the engine lives on."""
    engine = parafuse.Engine.from_pretrained("emoji", config, vae=None, **NO_TEXT)
    engine.vae_scale_factor = 4  # it has no VAE to tell it from
    latents = engine(**embeds, **CALL, seed=7, output_type="latent").images
    applied = list(engine.receipt["applied"])
    alone = {name: value for name, value in embeds.items() if "negative" not in name}
    unguided = engine(**alone, **CALL, seed=7, output_type="latent").images
    with pytest.raises(ConfigError, match="prompt: given, but the pipeline was loaded without its text encoders"):
        engine(PROMPT, **CALL)
    held = closed(engine)
    del engine
    return latents, unguided, applied, alive(held)


@torch.no_grad()
def decode(config: Any, latents: torch.Tensor) -> tuple[np.ndarray, list[str]]:
    engine = parafuse.Engine.from_pretrained("emoji", config, transformer=None, **NO_TEXT)
    packed = engine._unpack_latents(latents, CALL["height"], CALL["width"], engine.vae_scale_factor)
    scaled = packed / engine.vae.config.scaling_factor + engine.vae.config.shift_factor
    image = engine.image_processor.postprocess(engine.vae.decode(scaled, return_dict=False)[0], output_type="np")
    held = closed(engine)
    del engine
    return image, alive(held)


def stages(config: Any) -> tuple[np.ndarray, np.ndarray, list[str], list[list[str]], str]:
    """(picture, latents without guidance, what was applied, what lives on after each stage, what was said)."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        embeds, one = encode(config)
        latents, unguided, applied, two = denoise(config, embeds)
        image, three = decode(config, latents)
    return image, unguided.numpy(), applied, [one, two, three], said.getvalue()


def whole(**more: Any) -> Any:
    """By plain diffusers in one call."""
    guided = {"true_cfg_scale": 2.0, "negative_prompt": ""} | more
    call = CALL | {"prompt": PROMPT, "max_sequence_length": 16, "generator": torch.Generator().manual_seed(7)} | guided
    return plain()(**call).images


def test_stages_give_the_picture_of_one_call() -> None:
    want, unguided = whole(output_type="np"), whole(output_type="latent", true_cfg_scale=1.0).numpy()
    image, latents, applied, living, said = stages(None)
    assert np.array_equal(image, want)
    assert np.array_equal(latents, unguided), "without negative embeddings there is no guidance"
    assert (applied, living, said.count("no denoiser")) == ([], [[], [], []], 0)
    for rank, found in enumerate(run_ranks(stages, 2, TWO)):
        image, latents, applied, living, said = found
        assert np.abs(image - want).max() <= 1e-5
        assert np.abs(latents - unguided).max() <= 1e-5 * np.abs(unguided).max()
        assert applied == ["sequence parallel (ulysses 2) on transformer: 12 blocks"]
        assert living == [[], [], []]
        line = "FluxPipeline has no denoiser: every rank does all of the work"
        assert said.count(line) == (2 if rank == 0 else 0)


@pytest.mark.whole
def test_stages_on_ranks_that_the_engine_starts() -> None:
    embeds, living = encode(TWO)
    assert living == []
    latents, unguided, applied, living = denoise(TWO, embeds)
    assert (applied, living) == (["sequence parallel (ulysses 2) on transformer: 12 blocks"], [])
    assert not torch.equal(latents, unguided), "control: guidance changes them"
    assert np.abs(decode(None, latents)[0] - whole(output_type="np")).max() <= 1e-5


def loaded_without() -> list[Any]:
    """Engines for pipelines that are loaded already, and lack a denoiser; and for a UNet's text encoders alone."""
    pipeline = plain()
    pipeline.transformer = None
    with parafuse.Engine.from_pipeline(pipeline, TWO) as engine, torch.no_grad():
        embeds = engine.encode_prompt(prompt=PROMPT, prompt_2=None, max_sequence_length=16)[0]
    with parafuse.Engine.from_pretrained("tiny:sdxl", TWO, unet=None, vae=None) as engine, torch.no_grad():
        return [embeds, engine.encode_prompt("a cat")[0]]


def test_text_encoders_alone_of_any_pipeline() -> None:
    (embeds, of_unet), other = run_ranks(loaded_without, 2)
    with torch.no_grad():
        assert torch.equal(embeds, plain().encode_prompt(prompt=PROMPT, prompt_2=None, max_sequence_length=16)[0])
    assert torch.equal(embeds, other[0])
    assert torch.equal(of_unet, other[1])


def alone() -> list[Any]:
    """Rank 0 paints twice and rank 1 once, loaded and given; then both ask for several ranks, and for one call."""
    rank, found = dist.get_rank(), list[Any]()
    engine = parafuse.Engine.from_pretrained("emoji", alone=True)
    given = parafuse.Engine.from_pipeline(plain(), alone=True)
    own = dict(true_cfg_scale=2.0, negative_prompt="", max_sequence_length=16)
    for prompt in ("a dog", "a cat")[rank:]:
        found.append([np.asarray(one(prompt, **CALL, **own, seed=rank).images[0]) for one in (engine, given)])
        assert (engine.receipt["exchanged"], engine.receipt["applied"], engine.world.size) == ({}, [], 1)
    for refused in (
        lambda: parafuse.Engine.from_pretrained("emoji", TWO, alone=True),
        lambda: parafuse.Engine.from_pipeline(plain(), TWO, alone=True),
    ):
        with pytest.raises(ConfigError, match="alone=True: runs on one rank, but 2 were asked for; leave out one"):
            refused()
    with parafuse.Engine.from_pretrained("emoji", TWO) as together:
        with pytest.raises(RankMismatchError) as caught:
            together(f"prompt {rank}", **CALL, seed=7)
        together("a dog", **CALL, seed=7)  # it can go on
    return [found, str(caught.value), os.environ["RANK"]]


def test_ranks_alone_are_plain_diffusers_and_exchange_nothing() -> None:
    pipeline = plain()
    found = run_ranks(alone, 2)
    for rank, (pictures, why, _) in enumerate(found):
        assert len(pictures) == 2 - rank
        for prompt, both in zip(("a dog", "a cat")[rank:], pictures, strict=True):
            own = dict(true_cfg_scale=2.0, negative_prompt="", max_sequence_length=16)
            generator = torch.Generator().manual_seed(rank)
            want = np.asarray(pipeline(prompt, **CALL, **own, generator=generator).images[0])
            assert all(np.array_equal(one, want) for one in both)
        assert why == (
            'rank 1 was given a request other than rank 0\'s: prompt is "prompt 0" on rank 0, "prompt 1" on rank 1. '
            "Start every rank with the same arguments, or give all prompts in one call, with Parallel(data=N); an "
            "engine made with alone=True runs each rank's own."
        )
