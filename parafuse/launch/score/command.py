"""`parafuse score`: judges a folder of pictures by another one, by prompts, or by both. Checked without torch."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from parafuse.config import DEVICES
from parafuse.errors import ConfigError
from parafuse.launch import quiet
from parafuse.launch.score.gallery import Gallery, check_pairs, look, read_prompts, unlike_counted
from parafuse.launch.score.scorecard import exists
from parafuse.log import note

SSIM_PIXELS = 6
"""Of each side: SSIM's window of 11 is padded by reflection."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """By what to judge."""

    against: str | None = None
    """Folder of pictures of the same names to hold them against: PSNR, SSIM, and LPIPS if its weights are at hand."""
    unpaired: bool = False
    """The two folders hold other pictures: only the distances between the sets (--inception, --clip)."""
    clip: str | None = None
    """Folder of a CLIP model and its processor. With --prompts: CLIP scores; with --against: FID on CLIP features."""
    prompts: str | None = None
    """With --clip: a file with a prompt in each line, by sorted file name, or a JSON object of prompts by file name."""
    against_prompts: str | None = None
    """With --prompts and --against: what the pictures in that folder show, for CLIP directional similarity."""
    inception: str | None = None
    """With --against: torch-fidelity's weights of Inception v3 (a file), for FID."""
    device: str = "auto"
    """Of the networks, cpu or cuda; "auto": cuda where there is one."""
    out: str | None = None
    """JSON file to write all figures to. Not given: printed only."""
    quiet: bool = False
    """No table and no notes; errors only."""
    verbose: bool = False
    """Show the warnings and logs of the libraries underneath."""

    def __post_init__(self) -> None:
        given = {name for name, value in asdict(self).items() if value not in (None, False)}
        for name, needs in NEEDS.items():
            if name in given and not all(other in given for other in needs):
                shown = " and ".join(_flag(other) for other in needs)
                raise ConfigError(f"{_flag(name)}: needs {shown}; give that too, or leave it out.")
        if self.unpaired and not {"clip", "inception"} & given:
            raise ConfigError("--unpaired: leaves only distances between sets; give --inception or --clip too.")
        if self.unpaired and self.against_prompts is not None:
            raise ConfigError("--against-prompts: is for pairs of pictures; leave it or --unpaired out.")
        if self.device not in DEVICES:
            raise ConfigError(f"--device {self.device!r}: must be one of {', '.join(DEVICES)}.")
        if self.quiet and self.verbose:
            raise ConfigError("--quiet and --verbose exclude each other; give one of them.")
        if self.quiet and self.out is None:
            raise ConfigError("--quiet: nothing would be told; give --out FILE.json, or leave it out.")


NEEDS = {
    "prompts": ("clip",),
    "against_prompts": ("prompts", "against"),
    "inception": ("against",),
    "unpaired": ("against",),
}
"""Option -> those that it is of no use without."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """Checked: the folders have been listed, and every picture's size is known."""

    scoring: Scoring
    gallery: Gallery
    against: Gallery | None
    prompts: dict[str, str] = field(default_factory=dict[str, str])
    """File name -> prompt."""
    against_prompts: dict[str, str] = field(default_factory=dict[str, str])
    warnings: tuple[str, ...] = ()


def prepare(folder: str, scoring: Scoring) -> ScoringJob:
    """Checks the request without torch and without decoding a picture. Raises ConfigError at the first fault."""
    if scoring.against is None and scoring.prompts is None:
        raise ConfigError("score: has nothing to judge by; give --against FOLDER, or --clip with --prompts.")
    if importlib.util.find_spec("torchmetrics") is None:
        raise ConfigError("score: needs torchmetrics; pip install 'parafuse[eval]'.")
    _check_files(scoring)
    gallery = look("FOLDER", folder)
    against = look("--against", scoring.against) if scoring.against is not None else None
    if against is not None:
        if not scoring.unpaired:
            check_pairs(gallery, against, SSIM_PIXELS)
        if scoring.inception is not None or (scoring.clip is not None and scoring.prompts is None):
            _check_sets(gallery, against)
    told: list[str] = []
    prompts = _prompts("--prompts", scoring.prompts, gallery, told)
    before = _prompts("--against-prompts", scoring.against_prompts, against, told)
    return ScoringJob(
        scoring=scoring,
        gallery=gallery,
        against=against,
        prompts=prompts,
        against_prompts=before,
        warnings=tuple(told),
    )


def _prompts(field: str, file: str | None, gallery: Gallery | None, told: list[str]) -> dict[str, str]:
    """File name -> prompt; what may be wrong with them is added to `told`."""
    if file is None or gallery is None:
        return {}
    prompts, by_line = read_prompts(field, file, gallery.names)
    first = unlike_counted(gallery.names)
    if by_line and first:
        told.append(
            f"{field}: lines go by sorted file names, where {first[0]!r} is before {first[1]!r}; "
            "give a JSON object from file name to prompt if they are meant to go by number"
        )
    return prompts


def _check_files(scoring: Scoring) -> None:
    """Raises ConfigError where the file to write is there, or weights to read are not."""
    if scoring.out is not None:
        if not scoring.out.lower().endswith(".json"):
            raise ConfigError(f"--out {scoring.out!r}: must end in .json; give such a name.")
        if Path(scoring.out).exists():
            raise ConfigError(exists(Path(scoring.out)))
    if scoring.clip is not None:
        _check_clip(scoring.clip)
    if scoring.inception is not None and not Path(scoring.inception).is_file():
        raise ConfigError(f"--inception {scoring.inception!r}: is no file; nothing is downloaded: give its path.")


def _check_sets(gallery: Gallery, against: Gallery) -> None:
    for one in (gallery, against):
        if len(one) < 2:
            raise ConfigError(f"{one.field} {str(one.folder)!r}: has 1 picture; FID needs at least 2 in each folder.")


def _check_clip(path: str) -> None:
    """Raises ConfigError where `path` is no folder of a CLIP model."""
    config = Path(path) / "config.json"
    way_out = "give a folder with what save_pretrained of transformers' CLIPModel and CLIPProcessor writes."
    if not config.is_file():
        what = "has no config.json" if Path(path).is_dir() else "is no folder; nothing is downloaded"
        raise ConfigError(f"--clip {path!r}: {what}: {way_out}")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"--clip {path!r}: its config.json is no readable JSON object: {way_out}") from error
    if kind != "clip":
        raise ConfigError(f"--clip {path!r}: model_type={kind!r} in its config.json; must be 'clip': {way_out}")


def run(job: ScoringJob) -> None:
    """Measures, writes and tells. Raises ConfigError for what cannot be read."""
    try:
        importlib.import_module("torchmetrics.image.fid")
    except Exception as error:  # in many ways, where its torchvision is that of another torch
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ConfigError(
            f"score: torchmetrics does not load ({why}); if torchvision is installed, it must be the one "
            "of this torch: install that, or none."
        ) from error
    from parafuse.launch.score.judge import judge

    if not job.scoring.verbose:
        quiet.hide_loading_bars()
    card = judge(job)
    if job.scoring.out is not None:
        card.write(Path(job.scoring.out))
    for name, why in card.left_out.items():
        note(f"{name} is left out: {why}")
    for line in card.warnings:
        note(line)
    if not job.scoring.quiet:
        Console().print(card.table())
    if job.scoring.out is not None:
        print(job.scoring.out, flush=True)
