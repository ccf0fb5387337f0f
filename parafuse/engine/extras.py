"""What is asked for beside the layout, for a denoiser: what stands on it has all of it, or what of it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parafuse.cache import Cache, cache_of, with_calibration
from parafuse.config import Config
from parafuse.engine.rewrites.choose import Choice


@dataclass(frozen=True, kw_only=True)
class Extras:
    """None of it by default: the model runs as it is."""

    cache: Cache | None = None
    compile: bool = False
    cuda_graphs: bool = False
    rewrites: tuple[str, ...] = ()
    """Names, in the order in which they are put on."""
    chosen: Choice | None = None
    """What of them one denoiser gets; None until that is known."""

    @classmethod
    def of(cls, config: Config) -> Extras:
        return cls(
            cache=with_calibration(cache_of(config.cache)),
            compile=config.compile,
            cuda_graphs=config.cuda_graphs,
            rewrites=tuple(filter(None, config.rewrites.split(","))),
        )

    def __bool__(self) -> bool:
        return self != Extras()

    def without_cache(self) -> Extras:
        """For a denoiser that cannot have one, beside another that can."""
        return replace(self, cache=None)

    def with_rewrites(self, chosen: Choice) -> Extras:
        """For a denoiser that gets these of them."""
        return replace(self, chosen=chosen)

    def lines(self) -> list[str]:
        """What is asked for, in words."""
        found = [f"cache {self.cache}"] if self.cache else []
        found += ["compiled blocks"] if self.compile else []
        found += ["CUDA graphs"] if self.cuda_graphs else []
        if self.chosen is not None:
            return found + list(self.chosen.left_off)  # each rewrite says itself what it does
        return found + ([f"rewrites {','.join(self.rewrites)}"] if self.rewrites else [])
