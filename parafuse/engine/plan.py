"""What will run: every degree, dtype and device explicit. Torch-free, serialisable, replayable."""

# Plans are read from files, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from parafuse.attention import AUTO as AUTO_ATTENTION
from parafuse.attention import TORCH, Attention, Timings
from parafuse.cache import Cache, CalibratedCache, cache_of
from parafuse.calibration import Calibration
from parafuse.config import VAE_AUTO, VAE_REPLICATED, VAE_SHARDED, VAE_TILED, Axis, Config, Parallel
from parafuse.encoding import encoding_of
from parafuse.errors import ConfigError, reject_unknown
from parafuse.offload import offload_of
from parafuse.placement import DISK, Placement, placement_of
from parafuse.quantization import AUTO, Fp8, quantize_of
from parafuse.sparse import sparse_of

SCHEMA = 1
OPTIONAL = (
    "cache",
    "quantize",
    "compile",
    "cuda_graphs",
    "rewrites",
    "attention",
    "attention_timings",
    "sparse",
    "text_encoders",
    "vae",
    "placement",
    "devices_per_rank",
    "offload_folder",
    "offload",
    "calibration",
    "replay",
    "chosen",
    "why",
    "schema",
)
"""Fields that a plan may lack: an earlier version wrote it, or somebody by hand."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resolved from `Config`, model facts and hardware by `parafuse.engine.planner.resolve`."""

    model: str
    """Name, folder or hub id, as the user gave it."""
    model_id: str
    """Fingerprint of the model's configuration files: a plan is replayed only on the same architecture."""
    world_size: int
    """Number of ranks."""
    degrees: dict[str, int]
    """Axis -> degree; the product is `world_size`."""
    device: str
    """cpu or cuda."""
    dtype: str
    """float32, bfloat16 or float16."""
    timeout_s: float
    """Seconds that a rank waits for another."""
    cache: str = ""
    """The cache, as its text with every field; empty: none."""
    quantize: str = ""
    """The quantization, as its text with every field; empty: none."""
    compile: bool = False
    """Whether each kind of repeated block is compiled."""
    cuda_graphs: bool = False
    """Whether that is captured as CUDA graphs."""
    rewrites: str = ""
    """Exact changes of what a denoiser computes, by name; "auto" stays: which of them pay is told by the first call."""
    attention: str = TORCH
    """What computes attention in repeated blocks."""
    sparse: str = ""
    """Which pairs of a video's tokens attention leaves out, as its text with every field; empty: none."""
    text_encoders: str = "everywhere"
    """Where prompts are encoded, and what is kept of it, as its text with every field."""
    vae: str = VAE_REPLICATED
    """How ranks share decoding and encoding of pictures."""
    placement: dict[str, str] | None = None
    """Path of a component or of a module of it -> "0", "1", ... (devices as counted within the rank), "cpu" or "disk";
    the longest path decides. None: all parts together on the rank's device."""
    devices_per_rank: int = 1
    """Of a node's devices, rank n there has so many from n times as many on."""
    offload_folder: str = ""
    """For what is on the disk."""
    offload: str = ""
    """Where weights are while they are not used, as its text with every field; empty: where they are loaded."""
    attention_timings: dict[str, Any] | None = None
    """For `timed`: what was timed on the device, so that every rank takes the same backend."""
    calibration: dict[str, Any] | None = None
    """What the file that the cache names holds: so every rank has it, and a plan runs where the file is not."""
    replay: dict[str, list[str]] | None = None
    """Component -> for each of its calls a letter for each sample, `c` computed or `s` skipped: what a cache is to
    decide again, from a receipt. None: the cache decides."""
    chosen: bool = False
    """Whether nobody has named the degrees: a call that leaves some of them without work is then no error."""
    why: str = ""
    """One line: how the layout was chosen."""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Raises ConfigError for what no resolved plan holds: plans are read from files."""
        if not isinstance(self.degrees, dict) or self.degrees.keys() != set(Axis) or "auto" in self.degrees.values():
            raise ConfigError(f"plan.degrees={self.degrees!r}: must give a degree for each of {', '.join(Axis)}.")
        if not isinstance(self.world_size, int) or isinstance(self.world_size, bool) or self.world_size < 1:
            raise ConfigError(f"plan.world_size={self.world_size!r}: must be a whole number of at least 1.")
        for name, value in (("device", self.device), ("dtype", self.dtype)):
            if value == "auto":
                raise ConfigError(f"plan.{name}='auto': a plan is explicit; only a Config may say 'auto'.")
        parallel = Parallel(**cast("dict[str, Any]", self.degrees))
        self._config(parallel, cache_of(self.cache or None))
        if self.replay is not None and not self.cache:
            raise ConfigError("plan.replay: holds decisions of a cache, but plan.cache is empty.")
        parallel.degrees(self.world_size)
        self._check_placement()
        if self.vae == VAE_AUTO:
            raise ConfigError("plan.vae='auto': a plan is explicit; only a Config may say 'auto'.")
        if self.attention == AUTO_ATTENTION:
            raise ConfigError("plan.attention='auto': a plan is explicit; only a Config may say 'auto'.")
        self.cache_with_calibration()
        offload = offload_of(self.offload or None)
        if offload is not None and offload.device != self.device:
            raise ConfigError(f"plan.offload: device={offload.device}: must be the plan's, {self.device}.")
        if offload is not None:
            offload.check_between(self.sequence_degree)
        method = quantize_of(self.quantize or None)
        if isinstance(method, Fp8) and method.scale == AUTO:
            raise ConfigError("plan.quantize: scale=auto: a plan is explicit; only a Config may say 'auto'.")

    def _check_placement(self) -> None:
        each = self.devices_per_rank
        if not isinstance(each, int) or isinstance(each, bool) or each < 1:
            raise ConfigError(f"plan.devices_per_rank={each!r}: must be a whole number of at least 1.")
        if self.placement is None:
            return
        if not isinstance(self.placement, dict):
            raise ConfigError(f"plan.placement={self.placement!r}: must be a map of modules to devices.")
        asked = placement_of(self.placement)
        for path, home in asked.homes if asked is not None else ():
            if home.isdigit() and (self.device == "cpu" or int(home) >= each):
                there = "computes on the CPU" if self.device == "cpu" else f"has {each} (plan.devices_per_rank)"
                raise ConfigError(f"plan.placement[{path!r}]={home!r}: each rank {there}.")
            if home == DISK and not self.offload_folder:
                raise ConfigError(f"plan.placement[{path!r}]={home!r}: plan.offload_folder is missing.")

    def cache_with_calibration(self) -> Cache | None:
        """The cache, with what was measured for it. Raises ConfigError where that is missing, or not asked for."""
        cache = cache_of(self.cache or None)
        file = cache.calibration if isinstance(cache, CalibratedCache) else None
        if (file is None) != (self.calibration is None):
            way_out = "make the plan anew" if self.calibration is None else "leave it out"
            raise ConfigError(f"plan.calibration: does not fit plan.cache={self.cache!r}; {way_out}.")
        if not isinstance(cache, CalibratedCache) or self.calibration is None:
            return cache
        return dataclasses.replace(cache, calibration=Calibration.from_dict(self.calibration, str(file)))

    def config(self) -> Config:
        """What makes this plan again, on these ranks."""
        return self._config(Parallel(**cast("dict[str, Any]", self.degrees)), self.cache_with_calibration())

    def _config(self, parallel: Parallel, cache: Cache | None) -> Config:
        return Config(
            parallel=parallel,
            device=self.device,
            dtype=self.dtype,
            cache=cache,
            quantize=self.quantize or None,
            compile=self.compile,
            cuda_graphs=self.cuda_graphs,
            rewrites=self.rewrites,
            attention=self._attention(),
            sparse=self.sparse or None,
            text_encoders=self.text_encoders,
            vae=self.vae,
            placement=self._placed(),
            offload_folder=(self.offload_folder or None) if self.placement else None,
            offload=self.offload or None,
            timeout_s=self.timeout_s,
        )

    def _attention(self) -> Attention:
        timings = self.attention_timings
        known = None if timings is None else Timings.from_dict(timings, "plan.attention_timings")
        return Attention(self.attention, known)

    def degree(self, axis: Axis) -> int:
        return self.degrees[axis]

    @property
    def sequence_degree(self) -> int:
        """Number of ranks that share one sequence."""
        return self.degrees[Axis.RING] * self.degrees[Axis.ULYSSES]

    @property
    def changes_nothing(self) -> bool:
        """Whether the model runs as it is."""
        extras = (self.cache, self.quantize, self.compile, self.rewrites, self.sparse, self.offload)
        is_plain = self.attention == TORCH and not encoding_of(self.text_encoders).kept
        is_plain = is_plain and self.vae != VAE_TILED
        return self.world_size == 1 and not self.placement and not any(extras) and is_plain

    def without_replay(self) -> Plan:
        """The same, where the cache decides."""
        return dataclasses.replace(self, replay=None)

    def one_line(self) -> str:
        """E.g. `2 ranks: ulysses 2, float32 on cpu (all ranks left go to Ulysses)`."""
        axes = ", ".join(f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1) or "no splitting"
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        more = f", cache {cache.brief}" if (cache := cache_of(self.cache or None)) is not None else ""
        more += f", quantize {method.brief}" if (method := quantize_of(self.quantize or None)) is not None else ""
        more += ", compiled" + (" to CUDA graphs" if self.cuda_graphs else "") if self.compile else ""
        more += f", rewrites {self.rewrites}" if self.rewrites else ""
        more += f", attention {self.attention}" if self.attention != TORCH else ""
        more += f", sparse {sparse.brief}" if (sparse := sparse_of(self.sparse or None)) is not None else ""
        more += f", text encoders {encoding.brief}" if (encoding := encoding_of(self.text_encoders)).acts else ""
        more += f", vae {self.vae}" if self.vae in (VAE_TILED, VAE_SHARDED) else ""
        more += f", {self._placement_line()}" if self.placement else ""
        more += f", offload {offload.brief}" if (offload := offload_of(self.offload or None)) is not None else ""
        again = ", with the decisions of a receipt" if self.replay is not None else ""
        return f"{ranks}: {axes}, {self.dtype} on {self.device}{more}{again}" + (f" ({self.why})" if self.why else "")

    def _placed(self) -> Placement | None:
        found = placement_of(self.placement or None)
        return None if found is None else dataclasses.replace(found, device=self.device)

    def _placement_line(self) -> str:
        homes = dict.fromkeys((self.placement or {}).values())
        names = [f"device {home}" if home.isdigit() else home for home in sorted(homes)]
        return f"placed on {', '.join(names)} of each rank"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        names = [f.name for f in dataclasses.fields(cls)]
        reject_unknown("plan", values, names)
        missing = [name for name in names if name not in values and name not in OPTIONAL]
        if missing:
            raise ConfigError(f"plan: key {missing[0]!r} is missing. Write plans with --save-plan or Plan.save.")
        if values.get("schema", SCHEMA) != SCHEMA:
            raise ConfigError(
                f"plan.schema={values['schema']!r}: this version reads schema {SCHEMA}; make the plan anew."
            )
        if isinstance(values["degrees"], dict):
            reject_unknown("plan.degrees", cast("dict[str, Any]", values["degrees"]), Axis)
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """A plan from its JSON file, or from a receipt that holds one. Raises ConfigError when unreadable."""
        if not Path(path).is_file():
            raise ConfigError(f"plan={str(path)!r}: does not exist, or is no file.")
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"plan={str(path)!r}: cannot be read as JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"plan={str(path)!r}: must hold one JSON object.")
        values = cast("dict[str, Any]", values)
        if "plan" not in values:
            return cls.from_dict(values)
        decided = cast("dict[str, Any]", values.get("cache") or {}).get("decisions")
        return cls.from_dict({**values["plan"], **({"replay": decided} if decided else {})})

    def check(self, *, model_id: str, world_size: int) -> None:
        """Raises ConfigError when this plan was made for another model or number of ranks."""
        if self.model_id != model_id:
            raise ConfigError(
                f"plan.model_id={self.model_id!r}: made for {self.model!r}, not for this model ({model_id!r}). "
                "Leave the plan out, or give the model it was made for."
            )
        if self.world_size != world_size:
            there = "is 1 rank" if world_size == 1 else f"are {world_size} ranks"
            raise ConfigError(
                f"plan.world_size={self.world_size}: there {there}. Start {self.world_size}, or leave the plan out."
            )
