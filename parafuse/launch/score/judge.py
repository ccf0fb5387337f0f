"""Takes the figures that `parafuse score` is asked for, and says which are left out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor

from parafuse.engine.receipt import versions
from parafuse.errors import ConfigError
from parafuse.launch.bench.fidelity import lacks_lpips, lpips_on
from parafuse.launch.bench.record import today
from parafuse.launch.score.clip import BATCH, Clip, clip_scores, directions
from parafuse.launch.score.gallery import Gallery
from parafuse.launch.score.scorecard import OF_SETS, Scorecard
from parafuse.launch.score.scores import (
    INCEPTION_FEATURES,
    check_inception,
    frechet_distance,
    inception_distance,
    of_pair,
)

if TYPE_CHECKING:
    from parafuse.launch.score.command import ScoringJob

PACKAGES = ("torchmetrics", "torchvision", "torch-fidelity", "pillow")
"""Besides those of every receipt: what decides the figures, where it is installed."""


def judge(job: ScoringJob) -> Scorecard:
    """All figures that were asked for. Raises ConfigError for pictures or weights that cannot be read."""
    scoring = job.scoring
    found = {name: version for name in PACKAGES if (version := _version(name))}
    card = Scorecard(
        date=today(),
        versions=versions() | found,
        asked={"folder": str(job.gallery.folder), **asdict(scoring)},
        device=_device(scoring.device),
        files={name: {} for name in job.gallery.names},
        warnings=list(job.warnings),
    )
    if scoring.inception is not None:
        check_inception(scoring.inception)  # before anything that takes long
    clip = Clip(scoring.clip, card.device) if scoring.clip is not None else None
    if job.against is not None and not scoring.unpaired:
        _pairs(card, job.gallery, job.against)
    if clip is not None:
        _clip(card, job, clip)
    if scoring.inception is not None and job.against is not None:
        _tell_few(card, "fid", job.gallery, job.against, INCEPTION_FEATURES)
        sets = (map(one.read, one.names) for one in (job.gallery, job.against))
        card.sets["fid"] = inception_distance(scoring.inception, *sets, device=card.device)
    return card


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _device(asked: str) -> str:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ConfigError("--device 'cuda': there is none that torch can use; give cpu, or leave it out.")
    return asked if asked != "auto" else "cuda" if there else "cpu"


def _pairs(card: Scorecard, gallery: Gallery, against: Gallery) -> None:
    why = lacks_lpips(min(min(size) for size in gallery.sizes.values()))
    if why:
        card.left_out["LPIPS"] = why
    lpips = None if why else lpips_on(card.device)
    for name, figures in card.files.items():
        figures.update(of_pair(gallery.read(name), against.read(name), lpips))


def _clip(card: Scorecard, job: ScoringJob, clip: Clip) -> None:
    """CLIP scores, FID on CLIP features, CLIP directional similarity: each where it can be had."""
    after = _features(clip, job.gallery)
    before = _features(clip, job.against) if job.against is not None else None
    if job.prompts:
        prompts = list(job.prompts.values())
        _tell_cut(card, clip, "--prompts", prompts)
        prompts_after = clip.of_prompts(prompts)
        card.put("prompt", prompts)
        card.put("clip_score", clip_scores(after, prompts_after))
        if job.against_prompts and before is not None:
            prompts = list(job.against_prompts.values())
            _tell_cut(card, clip, "--against-prompts", prompts)
            card.put("against_prompt", prompts)
            card.put("clip_direction", directions(before, after, clip.of_prompts(prompts), prompts_after))
    if job.against is None or before is None:
        return
    name = "fid_on_clip_features"
    if min(len(after), len(before)) < 2:
        card.left_out[OF_SETS[name].label] = "a folder has 1 picture, and it needs 2 in each"
        return
    _tell_few(card, name, job.gallery, job.against, clip.num_features)
    card.sets[name] = frechet_distance(after, before)


def _features(clip: Clip, gallery: Gallery) -> Tensor:
    """(pictures, D), in the order of the file names."""
    return torch.cat([clip.of_pictures(batch) for batch in _batches(gallery)])


def _batches(gallery: Gallery) -> Iterator[list[Image]]:
    for start in range(0, len(gallery), BATCH):
        yield [gallery.read(name) for name in gallery.names[start : start + BATCH]]


def _tell_cut(card: Scorecard, clip: Clip, flag: str, prompts: list[str]) -> None:
    number = clip.too_long(prompts)
    if number:
        card.warnings.append(
            f"{flag}: {number} of {len(prompts)} prompts were cut: the model takes {clip.most_tokens} tokens"
        )


def _tell_few(card: Scorecard, name: str, gallery: Gallery, against: Gallery, num_features: int) -> None:
    fewest = min(len(gallery), len(against))
    if fewest < num_features:
        card.warnings.append(
            f"{OF_SETS[name].label}: {fewest} pictures for {num_features} features, too few for their covariance; "
            "compare it only with distances of as many pictures"
        )
