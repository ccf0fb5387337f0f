"""What is asked for beside the layout, for a denoiser: what stands on it has all of it, or what of it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from parafuse.attention import LOSSY_BACKENDS, TIMED, TORCH, Attention, attention_of
from parafuse.cache import Cache, StackCache, cache_of, with_calibration
from parafuse.config import VAE_AUTO, VAE_BY_SIZE, VAE_REPLICATED, VAE_TILED, Axis, Config
from parafuse.encoding import Encoding, Everywhere, encoding_of
from parafuse.engine.rewrites.choose import Choice
from parafuse.engine.timings import resolved
from parafuse.errors import ConfigError
from parafuse.kernels.backends import REGISTRY
from parafuse.offload import Offload, offload_of, settled_on
from parafuse.parallel import captured
from parafuse.placement import PlacedWeights, placed_weights, placement_of
from parafuse.sparse import Sparse, sparse_of


@dataclass(frozen=True, kw_only=True)
class Extras:
    """None of it by default: the model runs as it is."""

    cache: Cache | None = None
    compile: bool = False
    cuda_graphs: bool = False
    quantizes: bool = field(default=False, compare=False)
    """Whether weights are quantized, which what stands on a denoiser must know of."""
    rewrites: tuple[str, ...] = ()
    """Names, in the order in which they are put on."""
    attention: Attention = field(default_factory=lambda: Attention(TORCH))
    """What computes attention in repeated blocks."""
    sparse: Sparse | None = None
    """Which pairs of a video's tokens attention leaves out."""
    encoding: Encoding = field(default_factory=Everywhere)
    """Where text encoders run, and what is kept of what they give."""
    owner: int | None = field(default=None, compare=False)
    """Of a text encoder: the rank that has it, where it is one."""
    vae: str = VAE_AUTO
    """How autoencoders are shared; auto: by the size of a call."""
    offload: Offload | None = None
    """Where weights are while they are not used."""
    chosen: Choice | None = None
    """What of them one denoiser gets; None until that is known."""

    @classmethod
    def of(cls, config: Config, device: str) -> Extras:
        """`device`: its type, for what a Config leaves open."""
        return cls(
            attention=resolved(attention_of(config.attention), device),
            sparse=sparse_of(config.sparse),
            encoding=encoding_of(config.text_encoders),
            vae=VAE_AUTO if config.vae == VAE_BY_SIZE else config.vae,
            offload=settled_on(offload_of(config.offload), device)
            or placed_weights(placement_of(config.placement), config.offload_folder, device),
            cache=with_calibration(cache_of(config.cache)),
            compile=config.compile,
            cuda_graphs=config.cuda_graphs,
            quantizes=config.quantize is not None,
            rewrites=tuple(filter(None, config.rewrites.split(","))),
        )

    def __bool__(self) -> bool:
        return replace(self, vae=self.vae if self.vae == VAE_TILED else VAE_AUTO) != Extras()

    def without_cache(self) -> Extras:
        """For a denoiser that cannot have one, beside another that can."""
        return replace(self, cache=None)

    def of_encoder(self, owner: int) -> Extras:
        """For a text encoder, which has nothing else. `owner`: the rank that is to have it."""
        return Extras(encoding=self.encoding, owner=owner if self.encoding.one_rank else None)

    def of_denoiser(self) -> Extras:
        return replace(self, encoding=Everywhere(), vae=VAE_AUTO)

    def of_autoencoder(self) -> Extras:
        """For an autoencoder, which has nothing else."""
        return Extras(vae=self.vae)

    def with_rewrites(self, chosen: Choice) -> Extras:
        """For a denoiser that gets these of them."""
        return replace(self, chosen=chosen)

    def check(self, device: str, degree: Callable[[Axis], int]) -> None:
        """Raises ConfigError where something of it cannot be had on a device, or in a layout."""
        if self.offload is not None:
            self.offload.check_between(degree(Axis.RING) * degree(Axis.ULYSSES))
        if self.cuda_graphs and self.sparse is not None:
            raise ConfigError(
                f"cuda_graphs=True: not with sparse={self.sparse.brief}, whose first steps are whole; leave one out."
            )
        if self.cuda_graphs and isinstance(self.offload, PlacedWeights) and not self.offload.is_together:
            raise ConfigError(
                "cuda_graphs=True: not with a placement on several devices, the host or a disk, whose weights come and "
                "go; leave one out (compile=True works)."
            )
        if self.cuda_graphs:
            self._check_graphs(device, degree(Axis.RING) * degree(Axis.ULYSSES))
        if self.sparse is not None and self.attention.backend in LOSSY_BACKENDS:
            raise ConfigError(
                f"attention={self.attention.backend!r}: not with sparse={self.sparse.brief}, which is computed by a "
                "kernel of its own; leave one out."
            )
        if self.attention.backend not in (TORCH, TIMED):
            self._check_attention(device, degree(Axis.RING))

    def _check_graphs(self, device: str, sequence_degree: int) -> None:
        captured.refuse_without_graphs(device)
        if sequence_degree > 1:
            raise ConfigError(
                f"cuda_graphs=True: not with a sequence that {sequence_degree} ranks share, whose exchanges would be "
                "captured as well; use cfg or data for the ranks, or leave cuda_graphs out."
            )
        if self.cache is not None and not isinstance(self.cache, StackCache):
            raise ConfigError(
                f"cuda_graphs=True: not with cache {self.cache.method}, which changes parts of blocks; use one that "
                "skips blocks (first-block, teacache, taylorseer, interval, ...), or leave cuda_graphs out."
            )

    def _check_attention(self, device: str, ring_degree: int) -> None:
        name = self.attention.backend
        backend = REGISTRY.backends[name]
        able = [other for other, one in REGISTRY.backends.items() if not one.why_not_here(device)]
        why = backend.why_not_here(device)
        if why:
            raise ConfigError(f"attention={name!r}: {why}; here there are {', '.join(able)}.")
        if ring_degree > 1 and (not backend.has_lse or backend.lossy):
            why = "gives no log-sum-exp, by which a ring merges what its ranks have"
            if backend.has_lse:
                why = f"has {backend.lossy}, by scales of the tokens at hand; pictures would depend on the ranks"
            raise ConfigError(
                f"attention={name!r}: {why}; use ulysses in the place of ring {ring_degree}, or attention='torch'."
            )

    def lines(self) -> list[str]:
        """What is asked for, in words; what each part says by itself is left out."""
        found = [f"cache {self.cache}"] if self.cache else []
        found += ["compiled blocks"] if self.compile else []
        found += ["CUDA graphs"] if self.cuda_graphs else []
        found += [f"text encoders {self.encoding.brief}"] if self.encoding.acts else []
        found += [f"vae {self.vae}"] if self.vae not in (VAE_AUTO, VAE_REPLICATED) else []
        found += [f"offload {self.offload.brief}"] if self.offload else []
        if self.chosen is not None:
            return found + list(self.chosen.left_off)  # each rewrite says itself what it does
        return found + ([f"rewrites {','.join(self.rewrites)}"] if self.rewrites else [])
