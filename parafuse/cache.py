"""The caches that can be asked for: frozen, torch-free. Each skips work that would change little from step to step."""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

from parafuse.calibration import Calibration
from parafuse.errors import ConfigError
from parafuse.spelled import Spelled, chosen

TRANSFORMER, UNET = "transformer", "unet"
SEPARATE, JOINT = "separate", "joint"


@dataclass(frozen=True)
class Cache(Spelled):
    """What all caches have in common."""

    what: ClassVar[str] = "cache"
    models: ClassVar[tuple[str, ...]] = (TRANSFORMER,)
    """The kinds of denoiser that can have it."""


@dataclass(frozen=True)
class StackCache(Cache):
    """Some first blocks of a stack run in every step; where a rule says so, the others' residual is reused."""

    def __post_init__(self) -> None:
        self._check("warmup_steps", least=0)
        self._check("final_steps", least=0)
        self._check("max_consecutive_skips", least=1, optional=True)
        self._check("last_blocks", least=0)
        self._check("order", least=0)
        if self.order > 2:
            raise ConfigError(f"cache {self.method}: order={self.order}: must be 0, 1 or 2.")
        if self.branches not in (SEPARATE, JOINT):
            raise ConfigError(
                f"cache {self.method}: branches={self.branches!r}: must be {SEPARATE!r} (each branch of guidance "
                f"decides for itself) or {JOINT!r} (the first one of a step decides for the others)."
            )

    warmup_steps: int = dataclasses.field(default=3, kw_only=True)
    """Steps at the start that are computed."""
    final_steps: int = dataclasses.field(default=1, kw_only=True)
    """Steps at the end that are computed, where a pipeline tells how many there are: none of a bare model's."""
    max_consecutive_skips: int | None = dataclasses.field(default=None, kw_only=True)
    """Steps in a row that may be skipped; none: any number."""
    last_blocks: int = dataclasses.field(default=0, kw_only=True)
    """Blocks at the end of the stack that run in every step."""
    order: int = dataclasses.field(default=0, kw_only=True)
    """Of the forecast of the residual: 0 takes the last one, 1 and 2 go on along its Taylor series (TaylorSeer, Liu et
    al. 2025, arXiv:2503.06923)."""
    branches: str = dataclasses.field(default=SEPARATE, kw_only=True)
    """"separate": each branch of guidance decides for itself; "joint": the first one of a step for all."""

    @property
    def leading(self) -> int:
        """Blocks at the start, or of a UNet layers of its first levels, that run in every step."""
        return getattr(self, "first_blocks", 0)


@dataclass(frozen=True)
class FirstBlockCache(StackCache):
    """Skips where the first block's residual has changed little since the last computed step (ParaAttention's rule)."""

    method: ClassVar[str] = "first-block"
    models: ClassVar[tuple[str, ...]] = (TRANSFORMER, UNET)

    threshold: float = 0.1
    """Of sum|r - r_last| / sum|r_last| for the residual r of the first blocks; below it the others are skipped. 0 never
    skips."""
    first_blocks: int = dataclasses.field(default=1, kw_only=True)
    """Blocks at the start that run in every step. Of a UNet: layers of its first levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("threshold", least=0, whole=False)
        self._check("first_blocks", least=1)


@dataclass(frozen=True)
class IntervalCache(StackCache):
    """Computes every n-th step, and reuses the stack's residual in between."""

    method: ClassVar[str] = "interval"
    models: ClassVar[tuple[str, ...]] = (TRANSFORMER, UNET)

    every: int = 2
    """One step in so many is computed."""
    first_blocks: int = dataclasses.field(default=0, kw_only=True)
    """Blocks at the start that run in every step. Of a UNet: layers of its first levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("every", least=1)
        self._check("first_blocks", least=0)


@dataclass(frozen=True)
class TaylorSeerCache(IntervalCache):
    """Computes every n-th step, and forecasts the stack's residual in between (Liu et al. 2025, arXiv:2503.06923)."""

    method: ClassVar[str] = "taylorseer"
    models: ClassVar[tuple[str, ...]] = (TRANSFORMER,)

    every: int = 4
    """One step in so many is computed."""
    order: int = dataclasses.field(default=1, kw_only=True)
    """Of the forecast: 1 or 2."""


@dataclass(frozen=True)
class MaskCache(StackCache):
    """Computes the steps that are marked, and reuses the stack's residual in the others."""

    method: ClassVar[str] = "mask"
    models: ClassVar[tuple[str, ...]] = (TRANSFORMER, UNET)

    steps: str = "1"
    """A digit for each step: 1 computes, 0 reuses. Steps beyond its end are computed."""
    first_blocks: int = dataclasses.field(default=0, kw_only=True)
    """Blocks at the start that run in every step. Of a UNet: layers of its first levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("first_blocks", least=0)
        if not isinstance(self.steps, str) or not self.steps or set(self.steps) - {"0", "1"}:
            raise ConfigError(f"cache {self.method}: steps={self.steps!r}: must be digits 0 and 1, one for each step.")


@dataclass(frozen=True)
class DeepCache(StackCache):
    """Computes every n-th step, and in between a UNet's outermost layers only (Ma et al. 2023, arXiv:2312.00858)."""

    method: ClassVar[str] = "deepcache"
    models: ClassVar[tuple[str, ...]] = (UNET,)

    every: int = 3
    """One step in so many is computed."""
    branch: int = 0
    """The skip connection that is kept open: so many layers of the way down run in every step, and one more of the way
    up. 0 is the outermost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("every", least=1)
        self._check("branch", least=0)

    @property
    def leading(self) -> int:
        return self.branch


@dataclass(frozen=True)
class CalibratedCache(StackCache):
    """Skips the whole stack, the first block too, by what was measured of the model beforehand."""

    needs_calibration: ClassVar[bool]

    threshold: float
    """Of what has accumulated since the last computed step; below it the stack is skipped. 0 never skips."""
    calibration: Calibration | str | None = None
    """The file that parafuse calibrate has written for this model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("threshold", least=0, whole=False)
        name = self.calibration
        if isinstance(name, PathLike):
            object.__setattr__(self, "calibration", name := str(name))
        if name is None and self.needs_calibration:
            raise ConfigError(
                f"cache {self.method}: calibration=None: needs a file; write one with parafuse calibrate --model MODEL."
            )
        if isinstance(name, str) and (not name or "," in name or name.lower() == "none"):
            raise ConfigError(f"cache {self.method}: calibration={name!r}: must be the name of a file without commas.")
        if name is not None and not isinstance(name, (str, Calibration)):
            raise ConfigError(f"cache {self.method}: calibration={name!r}: must be the name of a file.")


@dataclass(frozen=True)
class TeaCache(CalibratedCache):
    """Skips while the changes of the first block's modulated input, step by step, add up to little (Liu et al. 2024,
    arXiv:2411.19108)."""

    method: ClassVar[str] = "teacache"
    needs_calibration: ClassVar[bool] = False

    threshold: float = 0.1
    """Of the sum of sum|m - m_before| / sum|m_before| for the modulated input m since the last computed step, each
    rescaled by the calibration's polynomial; below it the stack is skipped. 0 never skips."""
    calibration: Calibration | str | None = None
    """The file that parafuse calibrate has written for this model. None: changes count as they are."""


@dataclass(frozen=True)
class MagCache(CalibratedCache):
    """Skips while the size of the stack's residual, as it was measured beforehand, drifts by little (Ma et al. 2025,
    arXiv:2506.09045). Measures nothing while it runs."""

    method: ClassVar[str] = "magcache"
    needs_calibration: ClassVar[bool] = True

    threshold: float = 0.06
    """Of the sum of |1 - m| since the last computed step, where m is the residual's size over that of the last computed
    step; below it the stack is skipped. 0 never skips."""
    warmup_steps: int = dataclasses.field(default=6, kw_only=True)
    """Steps at the start that are computed: the method's retention ratio, 0.2, of 28 steps."""
    max_consecutive_skips: int | None = dataclasses.field(default=3, kw_only=True)
    """Steps in a row that may be skipped; none: any number."""


@dataclass(frozen=True)
class PartCache(Cache):
    """Reuses what parts of blocks (attention, feed-forward) gave in an earlier step of a branch, by a schedule."""

    models: ClassVar[tuple[str, ...]] = (TRANSFORMER, UNET)

    warmup_steps: int = dataclasses.field(default=3, kw_only=True)
    """Steps at the start that are computed."""
    final_steps: int = dataclasses.field(default=1, kw_only=True)
    """Steps at the end that are computed, where a pipeline tells how many there are: none of a bare model's."""

    def __post_init__(self) -> None:
        self._check("warmup_steps", least=0)
        self._check("final_steps", least=0)


@dataclass(frozen=True)
class PyramidAttentionBroadcast(PartCache):
    """Computes attention every n-th step only: the less it changes from step to step, the more seldom (Zhao et al.
    2024, arXiv:2408.12588)."""

    method: ClassVar[str] = "pab"

    spatial: int = 2
    """Self-attention is computed in one step of so many; 1: in all (Zhao et al. 2024, arXiv:2408.12588)."""
    temporal: int = 4
    """The same for self-attention over frames alone (arXiv:2408.12588)."""
    cross: int = 6
    """The same for cross-attention (arXiv:2408.12588)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("spatial", "temporal", "cross"):
            self._check(name, least=1)


@dataclass(frozen=True)
class ForaCache(PartCache):
    """Computes attention and feed-forward layers every n-th step only (FORA, Selvaraju et al. 2024,
    arXiv:2407.01425)."""

    method: ClassVar[str] = "fora"

    every: int = 3
    """Attention is computed in one step of so many (Selvaraju et al. 2024, arXiv:2407.01425)."""
    feed_forward: int | None = None
    """The same for feed-forward layers; none: as attention (arXiv:2407.01425)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("every", least=1)
        self._check("feed_forward", least=1, optional=True)


@dataclass(frozen=True)
class TGateCache(Cache):
    """Computes cross-attention in the first steps only; each branch of guidance keeps its own (T-GATE, Liu et al. 2024,
    arXiv:2404.02747)."""

    method: ClassVar[str] = "tgate"
    models: ClassVar[tuple[str, ...]] = (TRANSFORMER, UNET)

    steps: int = 10
    """Steps in which cross-attention is computed; later ones reuse the last of these (Liu et al. 2024,
    arXiv:2404.02747)."""

    def __post_init__(self) -> None:
        self._check("steps", least=1)


@dataclass(frozen=True)
class FasterCache(PartCache):
    """Computes attention every n-th step only, and goes on along its last two outputs in between; computes all branches
    of guidance every m-th step only, and in between makes the others from one of them (Lv et al. 2024,
    arXiv:2410.19355). That one is the first that is called in a step, or the last of those stacked in a batch: in
    diffusers' pipelines mostly the conditional one."""

    method: ClassVar[str] = "fastercache"

    every: int = 2
    """Attention is computed in one step of so many (Lv et al. 2024, arXiv:2410.19355)."""
    weight: float = dataclasses.field(default=1.0, kw_only=True)
    """Of the difference between the last two outputs, at the end: it rises from 0 with the steps (arXiv:2410.19355).
    Where the number of steps is not known (a bare model) it is half of this throughout."""
    unconditional: int = dataclasses.field(default=5, kw_only=True)
    """All branches of guidance, and their attention, are computed in one step of so many; 1: in all
    (arXiv:2410.19355)."""
    frequency_weight: float = dataclasses.field(default=0.1, kw_only=True)
    """Low frequencies of the difference between branches count for 1 + this in the first half of the steps, high ones
    in the second; where the result has height and width, not tokens (arXiv:2410.19355)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "unconditional"):
            self._check(name, least=1)
        for name in ("weight", "frequency_weight"):
            self._check(name, least=0, whole=False)


@dataclass(frozen=True)
class TokenMerging(Cache):
    """Merges tokens that are alike around a UNet's self-attention at its largest resolutions (Bolya and Hoffman 2023,
    arXiv:2303.17604)."""

    method: ClassVar[str] = "token-merging"
    models: ClassVar[tuple[str, ...]] = (UNET,)

    ratio: float = 0.5
    """Of the tokens, how many are merged into others: 0 to 0.75, as one of each 2 x 2 stays (arXiv:2303.17604)."""
    max_downsample: int = dataclasses.field(default=1, kw_only=True)
    """Blocks on latents that are made smaller by up to so much, along each side, merge: 1, 2, 4 or 8
    (arXiv:2303.17604)."""

    def __post_init__(self) -> None:
        self._check("ratio", least=0, whole=False)
        self._check("max_downsample", least=1)
        if self.ratio > 0.75:
            raise ConfigError(f"cache {self.method}: ratio={self.ratio!r}: must be at most 0.75.")


METHODS: dict[str, type[Cache]] = {
    one.method: one
    for one in (
        FirstBlockCache, TaylorSeerCache, TeaCache, MagCache, DeepCache, IntervalCache, MaskCache,
        PyramidAttentionBroadcast, ForaCache, TGateCache, FasterCache, TokenMerging,
    )
}  # fmt: skip


def with_calibration(cache: Cache | None) -> Cache | None:
    """The same with what its file holds. Raises ConfigError for a file that is no calibration."""
    if isinstance(cache, CalibratedCache) and isinstance(cache.calibration, str):
        return dataclasses.replace(cache, calibration=Calibration.read(cache.calibration))
    return cache


def calibration_of(cache: Cache | None) -> Calibration | None:
    """What was read of a cache's file."""
    found = getattr(cache, "calibration", None)
    return found if isinstance(found, Calibration) else None


ALLOWED = "a text such as 'first-block:0.1', a parafuse.Cache, or None"


def cache_of(value: Any) -> Cache | None:
    """The cache that a text names, or the value itself. Raises ConfigError with what is allowed."""
    return None if value is None else chosen("cache", value, METHODS, ALLOWED)
