"""What the user asks for: frozen, keyword-only, torch-free. The only place where "auto" may stand."""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, cast

from parafuse.attention import Attention, attention_of
from parafuse.cache import Cache, cache_of
from parafuse.encoding import Encoding, encoding_of
from parafuse.errors import ConfigError, nearest, reject_unknown
from parafuse.offload import RANKS, Offload, offload_of
from parafuse.placement import MaxMemory, Placement, max_memory_of, placement_of
from parafuse.quantization import Quantize, quantize_of
from parafuse.sparse import Sparse, sparse_of


class Axis(StrEnum):
    """The mesh axes, outermost first. `ring` is outside `ulysses`: Ulysses stays on the fastest links."""

    DATA = "data"
    CFG = "cfg"
    PIPE = "pipe"
    RING = "ring"
    ULYSSES = "ulysses"
    TENSOR = "tensor"


CHOSEN = (Axis.DATA, Axis.CFG, Axis.RING, Axis.ULYSSES)
"""Axes whose degree may be left to be chosen."""
MAX_BRANCHES = 3
SEQUENCE_AXES = (Axis.RING, Axis.ULYSSES)
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
Auto = Literal["auto"]
REWRITES = ("qkv", "text", "modulation", "rope")
"""Exact changes of what a denoiser computes, in the order in which they are put on."""
VAE_AUTO, VAE_BY_SIZE, VAE_REPLICATED, VAE_TILED, VAE_SHARDED = VAES = (
    "auto", "by-size", "replicated", "tiled", "sharded",
)  # fmt: skip
"""How several ranks decode latents to pictures, and encode pictures."""
LOSSY = "lossy"
"""In a field's metadata: the values of it that change pictures by more than the order of sums. Each has a measured
loss, which its help quotes (`make losses`)."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Degrees of the mesh axes, whose product must be the number of ranks. Where none is given, they are chosen by cost
    (docs/planner.md). "auto" on an axis leaves that one to be chosen; `ulysses="auto"` beside given degrees takes what
    is left."""

    data: int | Auto = 1
    """Replicas that share the pictures of a call: prompts, and pictures of one prompt."""
    cfg: int | Auto = 1
    """Ranks for the branches of classifier-free guidance (with and without prompt): 2, or 3 for pipelines of three."""
    pipe: int = 1
    """Stages of a patch pipeline. Only 1 in this version."""
    ring: int | Auto = 1
    """Ring attention: keys and values travel from rank to rank."""
    ulysses: int | Auto = "auto"
    """Ulysses: heads are exchanged for tokens around attention. "auto" beside other degrees: all ranks that are
    left."""
    tensor: int = 1
    """Tensor parallel: weights cut. Only 1 in this version."""

    def __post_init__(self) -> None:
        for axis in Axis:
            degree = getattr(self, axis)
            if degree == "auto" and axis in CHOSEN:
                continue
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ConfigError(f"parallel.{axis}={degree!r}: must be a whole number of at least 1.")
            if degree > 1 and axis in (Axis.PIPE, Axis.TENSOR):
                raise ConfigError(
                    f"parallel.{axis}={degree}: this version runs only 1 on the '{axis}' axis; "
                    "use parallel.cfg, parallel.data, parallel.ulysses or parallel.ring for more ranks."
                )
        if self.cfg != "auto" and self.cfg > MAX_BRANCHES:
            raise ConfigError(
                f"parallel.cfg={self.cfg}: guidance has at most {MAX_BRANCHES} branches, mostly 2; use parallel.cfg=2, "
                "and parallel.data or parallel.ulysses for more ranks."
            )

    @property
    def is_chosen(self) -> bool:
        """Whether degrees are left to the planner: none is given, or one beside Ulysses' is "auto"."""
        return self == Parallel() or "auto" in (self.data, self.cfg, self.ring)

    def degrees(self, world_size: int) -> dict[Axis, int]:
        """Every axis's degree for `world_size` ranks, where nothing chooses them: Ulysses has what is left. Raises
        ConfigError when the product does not fit."""
        fixed = {axis: getattr(self, axis) for axis in Axis if getattr(self, axis) != "auto"}
        fixed |= dict.fromkeys({Axis.DATA, Axis.CFG, Axis.RING} - fixed.keys(), 1)
        product = 1
        for degree in fixed.values():
            product *= degree
        if Axis.ULYSSES not in fixed and world_size % product == 0:
            fixed[Axis.ULYSSES] = world_size // product
            product = world_size
        if product != world_size:
            asked = " x ".join(f"{axis}={degree}" for axis, degree in fixed.items() if degree > 1) or "all axes 1"
            there = "is 1" if world_size == 1 else f"are {world_size}"
            more = f"{product}, or a multiple of it" if self.ulysses == "auto" and product > 1 else f"{product}"
            raise ConfigError(
                f"parallel: {asked} makes {product} ranks, but there {there}. "
                f"Start {more}, or choose degrees whose product is {world_size}, such as ulysses={world_size}."
            )
        return {axis: fixed[axis] for axis in Axis}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and how. `Config()` on N ranks means the layout that costs the least there; on one rank it changes
    nothing."""

    parallel: Parallel = field(default_factory=Parallel)
    """Degrees of the mesh axes."""
    dtype: str = field(default="auto", metadata={LOSSY: ("bfloat16", "float16")})
    """float32, bfloat16 or float16; "auto": bfloat16 on CUDA, float32 on the CPU."""
    device: str = "auto"
    """cpu or cuda; "auto": cuda where there is one for each local rank."""
    cache: Cache | str | None = field(default=None, metadata={LOSSY: ("first-block:0.2", "taylorseer:3", "interval:2")})
    """Skips work that changes little from step to step: first-block:0.1, taylorseer:4, interval:2, mask:1101, ... with
    fields after a comma (first-block:0.1,warmup_steps=4); docs/caches.md has them all."""
    quantize: Quantize | str | None = field(
        default=None, metadata={LOSSY: ("fp8:reference=true", "int8", "int8-weight")}
    )
    """Computes or keeps linear layers in 8 bits: fp8, fp8-weight, int8 or int8-weight, with fields after a colon
    (fp8:text_encoders=int8-weight); docs/quantize.md has them all."""
    compile: bool = False
    """Compiles each kind of repeated block once (torch.compile, one whole graph), in every layout and with caches."""
    cuda_graphs: bool = False
    """Captures what is compiled as CUDA graphs, one for each shape. Needs compile and a GPU."""
    rewrites: str = ""
    """Exact changes of what is computed, by name with commas: qkv (one product for queries, keys and values), text
    (padded text is cut off), modulation (of all steps at once), rope (fewer kernels in blocks of two streams); auto:
    those that pay here."""
    attention: Attention | str = field(default="auto", metadata={LOSSY: ("fp8-reference",)})
    """What computes attention in repeated blocks: torch (its own choice), flash, cudnn, efficient, cpu-flash,
    flash-attn-2, flash-attn-3, flash-attn-4, math, or in 8 bits sage, fp8, fp8-reference; "auto": the fastest exact one
    that parafuse tune attention has timed here, else torch."""
    sparse: Sparse | str | None = field(default=None, metadata={LOSSY: ("window:0,4,4,tile=1x4x4",)})
    """Leaves pairs of a video's tokens out of attention: window:2,8,8 (frames, rows and columns around), radial:0.5
    (less of a frame the further in time), content:0.9 (what matters most, head by head), with fields after a comma
    (dense_steps=4); docs/attention.md has them all."""
    text_encoders: Encoding | str = "everywhere"
    """Where prompts are encoded: everywhere (each rank for itself), or one-rank (each text encoder on one rank, which
    sends what it gives); with :kept=32, results of the last 32 texts are kept for calls that repeat them."""
    vae: str = VAE_AUTO
    """How ranks share decoding and encoding of pictures: replicated (each rank for itself), tiled (diffusers' own
    tiles, spread over ranks), sharded (undivided, each rank a part of the picture), by-size (in an engine's requests
    large calls are shared, in the form that changes no picture); auto: by-size on several ranks; docs/vae.md."""
    placement: Placement | Mapping[str, Any] | str | None = None
    """Where the parts of the model are: balanced (components and blocks over the devices of each rank, by bytes, the
    host and a disk as last resorts), auto (so, if it does not fit on one), a map of modules to devices as JSON or a
    .json file, or rank (all together on the rank's device); docs/placement.md."""
    max_memory: MaxMemory | Mapping[Any, Any] | str | None = None
    """Weights that a placement may keep in each place, devices counted within the rank: 0=40GiB,1=40GiB,cpu=60GiB."""
    offload_folder: str | None = None
    """Folder for weights that a placement keeps on the disk."""
    offload: Offload | str | None = None
    """Keeps weights elsewhere while they are not used: model (a component at a time is on the device), group (a block
    at a time, group:level=leaf a layer), sequential, with fields after a colon (group:to=disk,prefetch=2);
    docs/offload.md has them all."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for another one before the request fails on all of them."""
    allow_pickle: bool = False
    """Accept weights in pickle format (.bin, .pt, .ckpt), which can run code when they are loaded."""

    def __post_init__(self) -> None:
        if not isinstance(self.parallel, Parallel):
            raise ConfigError(f"parallel={self.parallel!r}: must be parafuse.Parallel(...).")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}.")
        if self.device not in DEVICES:
            raise ConfigError(f"device={self.device!r}: must be one of {', '.join(DEVICES)}.")
        object.__setattr__(self, "cache", cache_of(self.cache))
        object.__setattr__(self, "quantize", quantize_of(self.quantize))
        object.__setattr__(self, "attention", attention_of(self.attention))
        object.__setattr__(self, "sparse", sparse_of(self.sparse))
        object.__setattr__(self, "text_encoders", encoding_of(self.text_encoders))
        object.__setattr__(self, "offload", offload_of(self.offload))
        for name in ("compile", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be true or false.")
        if self.cuda_graphs and not self.compile:
            raise ConfigError("cuda_graphs=True: captures what is compiled; give compile=True too.")
        if self.vae not in VAES:
            hint = nearest(self.vae, VAES) if isinstance(self.vae, str) else ""
            raise ConfigError(f"vae={self.vae!r}: must be one of {', '.join(VAES)}{hint or '.'}")
        self._check_rewrites()
        self._check_placement()
        self._check_offload()
        number = isinstance(self.timeout_s, (int, float)) and not isinstance(self.timeout_s, bool)
        if not number or not 1 <= self.timeout_s <= 86_400:
            raise ConfigError(f"timeout_s={self.timeout_s!r}: must be from 1 to 86400 seconds.")
        if not isinstance(self.allow_pickle, bool):
            raise ConfigError(f"allow_pickle={self.allow_pickle!r}: must be true or false.")

    def _check_rewrites(self) -> None:
        """Puts the names in their order."""
        if not isinstance(self.rewrites, str):
            raise ConfigError(f"rewrites={self.rewrites!r}: must be a text of names with commas, such as 'qkv,rope'.")
        names = [name.strip() for name in self.rewrites.split(",") if name.strip()]
        if names == ["auto"]:
            return
        reject_unknown(f"rewrites={self.rewrites!r}", names, REWRITES)
        if "rope" in names and not self.compile:
            raise ConfigError(
                f"rewrites={self.rewrites!r}: rope changes the graphs of compiled blocks, but compile=False; give "
                "compile=True too, or leave rope out."
            )
        if "qkv" in names and self.quantize is not None:
            raise ConfigError(
                f"rewrites={self.rewrites!r}: qkv joins weights, and quantize takes them one by one; leave one of both "
                "out."
            )
        object.__setattr__(self, "rewrites", ",".join(name for name in REWRITES if name in names))

    def _check_placement(self) -> None:
        object.__setattr__(self, "placement", placement_of(self.placement))
        object.__setattr__(self, "max_memory", max_memory_of(self.max_memory))
        folder = self.offload_folder
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise ConfigError(f"offload_folder={folder!r}: must be the name of a folder.")
        for name, value in (("max_memory", self.max_memory), ("offload_folder", folder)):
            if value is not None and self.placement is None:
                raise ConfigError(f"{name}={str(value)!r}: is for a placement; give placement='balanced' or a map too.")
        if self.placement is not None and self.offload is not None:
            raise ConfigError(
                f"placement={str(self.placement)!r}: not with offload={str(self.offload)!r}, which keeps all weights "
                "elsewhere; leave one of both out (a placement keeps on the host or a disk what finds no room)."
            )

    def _check_offload(self) -> None:
        """Raises ConfigError for what needs weights that stay where they are."""
        if not isinstance(self.offload, Offload):
            return
        said = f"offload={self.offload.brief}"
        if self.offload.to == RANKS and encoding_of(self.text_encoders).one_rank:
            raise ConfigError(
                f"{said}: not with text_encoders={str(self.text_encoders)!r}, whose calls one rank makes alone, while "
                "weights come from all; use text_encoders='everywhere'."
            )
        if self.cuda_graphs:
            raise ConfigError(
                f"{said}: not with cuda_graphs=True, whose graphs read weights where they were captured; leave one of "
                "both out (compile=True works)."
            )
        if self.offload.is_fine and self.compile:
            raise ConfigError(
                f"{said}: not with compile=True, which runs a block as one graph, inside of which no layer can come by "
                "itself; use offload='group' (by blocks) or 'model', or leave compile out."
            )
        if self.offload.is_fine and "qkv" in self.rewrites:
            raise ConfigError(
                f"{said}: not with rewrites='qkv', which joins weights of layers that come one by one; use "
                "offload='group' (by blocks) or 'model', or leave qkv out."
            )

    def to_dict(self) -> dict[str, Any]:
        texts = {
            name: str(one) if (one := getattr(self, name)) else None
            for name in ("cache", "quantize", "sparse", "placement", "max_memory", "offload")
        }
        texts |= {"attention": str(self.attention), "text_encoders": str(self.text_encoders)}
        return dataclasses.asdict(self) | texts

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "config") -> Config:
        """Config from plain values (as in JSON). Unknown keys raise ConfigError with `where` and the nearest name."""
        reject_unknown(where, values, (f.name for f in dataclasses.fields(cls)))
        values = dict(values)
        parallel = values.pop("parallel", {})
        if not isinstance(parallel, dict):
            raise ConfigError(f"parallel={parallel!r}: must be an object of axis: degree.")
        parallel = cast("dict[str, Any]", parallel)
        reject_unknown(f"{where}: parallel", parallel, Axis)
        return cls(parallel=Parallel(**parallel), **values)

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Config from a JSON file. Raises ConfigError when it cannot be read."""
        if not Path(path).is_file():
            raise ConfigError(f"config={str(path)!r}: does not exist, or is no file.")
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"config={str(path)!r}: cannot be read as JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config={str(path)!r}: must hold one JSON object.")
        return cls.from_dict(cast("dict[str, Any]", values), where=f"config={str(path)!r}")
