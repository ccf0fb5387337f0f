"""What is measured, as data: a model, one call of it, and the variants that run it. Imports no torch."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from parafuse.attention import attention_of
from parafuse.cache import cache_of
from parafuse.config import DTYPES, Axis, Parallel
from parafuse.engine.architecture import RANDOM, TINY
from parafuse.errors import ConfigError, nearest, reject_unknown
from parafuse.quantization import quantize_of
from parafuse.sparse import sparse_of

CASES = Path(__file__).parent / "cases"
ALL = "all"
"""As a degree: every rank there is."""
WAYS = {
    "plain": "the pipeline as diffusers runs it",
    "parafuse": "under parafuse, with the degrees in `parallel`",
    "diffusers context parallel": "diffusers' own, Ulysses over all ranks",
    "diffusers first-block cache": "diffusers' own, at its default threshold, or at `threshold`",
    "cache-dit": "its default cache, or with `threshold` as its residual_diff_threshold",
    "para-attn first-block cache": "at its default threshold, or at `threshold` as its residual_diff_threshold",
    "para-attn context parallel": "over all ranks",
    "xfuser": "its Ulysses, and on one rank its first-block cache",
}
PACKAGES = {"cache-dit": "cache_dit", "xfuser": "xfuser"} | dict.fromkeys(
    ("para-attn first-block cache", "para-attn context parallel"), "para_attn"
)
"""Ways -> the package that each needs beside parafuse's own."""
ALONE = ("plain", "diffusers first-block cache", "para-attn first-block cache")
"""Ways that use one rank."""
CACHES = ("diffusers first-block cache", "cache-dit", "para-attn first-block cache", "xfuser")
"""Ways that skip blocks in some steps (xfuser: on one rank), so that steps are not alike."""
THRESHOLDS = ("diffusers first-block cache", "cache-dit", "para-attn first-block cache")
"""Of these, those that take a threshold."""
REPLICATED = ("cache-dit",)
"""Ways that do the whole on every rank: it reduces over all ranks that there are, and would wait for them."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the case."""

    name: str
    way: str = "parafuse"
    parallel: dict[str, int | str] = field(default_factory=dict[str, int | str])
    """Degrees by axis; "all": as many as there are ranks. Of what is not named, ulysses takes the rest."""
    compile: bool = False
    """The repeated blocks, by torch.compile, in full graphs."""
    needs_ranks: int = 1
    """Left out where there are fewer."""
    cache: str = ""
    """Of way='parafuse': a cache as its text, such as first-block:0.1."""
    quantize: str = ""
    """Of way='parafuse': a quantization as its text, such as fp8."""
    attention: str = ""
    """Of way='parafuse': what computes attention, such as flash-attn-3."""
    sparse: str = ""
    """Of way='parafuse': a sparse attention as its text, such as radial:0.5."""
    threshold: float | None = None
    """Of another engine's cache, in place of its default one."""
    share_of: int = 1
    """Above 1: one rank's share of a world of so many, on one device; the wire is modelled (see `share`)."""
    may_fail: bool = False
    """Its failure is a row with the reason, as another engine's is; otherwise it ends the measurement."""
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    """Keywords of the call beside the case's."""

    def __post_init__(self) -> None:
        if self.share_of < 1 or (self.share_of > 1 and (self.way != "parafuse" or self.needs_ranks > 1)):
            raise ConfigError(
                f"variant {self.name!r}: share_of={self.share_of}: must be at least 1, for way='parafuse' on one rank."
            )
        if self.way not in WAYS:
            raise ConfigError(f"variant {self.name!r}: way={self.way!r}: must be one of {', '.join(WAYS)}.")
        reject_unknown(f"variant {self.name!r}: parallel", self.parallel, [str(axis) for axis in Axis])
        if self.parallel and self.way != "parafuse":
            raise ConfigError(f"variant {self.name!r}: parallel is for way='parafuse', not for {self.way!r}.")
        for field_name, value, read in (
            ("quantize", self.quantize, quantize_of),
            ("attention", self.attention, attention_of),
            ("sparse", self.sparse, sparse_of),
        ):
            if value:
                self._check_text(field_name, value, read)
        self._check_cache()

    def _check_text(self, field_name: str, value: str, read: Callable[[str], Any]) -> None:
        if self.way != "parafuse":
            raise ConfigError(f"variant {self.name!r}: {field_name} is for way='parafuse', not for {self.way!r}.")
        try:
            read(value)
        except ConfigError as error:
            raise ConfigError(f"variant {self.name!r}: {error}") from error

    def _check_cache(self) -> None:
        if self.cache:
            if self.way != "parafuse":
                raise ConfigError(f"variant {self.name!r}: cache is for way='parafuse', not for {self.way!r}.")
            if self.share_of > 1:
                raise ConfigError(
                    f"variant {self.name!r}: share_of={self.share_of}: has no cache, since what that skips depends on "
                    "weights and pictures, and those of a share mean nothing; leave out one of the two."
                )
            try:
                cache_of(self.cache)
            except ConfigError as error:
                raise ConfigError(f"variant {self.name!r}: {error}") from error
        if self.threshold is None:
            return
        if self.way not in THRESHOLDS:
            where = "in its text of `cache`" if self.way == "parafuse" else "nowhere"
            raise ConfigError(
                f"variant {self.name!r}: threshold is for {', '.join(THRESHOLDS)}; {self.way!r} takes one {where}."
            )
        is_number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not is_number or not 0 < self.threshold < math.inf:
            raise ConfigError(f"variant {self.name!r}: threshold={self.threshold!r}: must be a number above 0.")

    def config(self, ranks: int) -> Parallel:
        """The degrees for so many ranks. Raises ConfigError where they do not fit."""
        degrees: dict[str, Any] = {a: ranks if degree == ALL else degree for a, degree in self.parallel.items()}
        parallel = Parallel(**degrees)
        try:
            parallel.degrees(ranks)
        except ConfigError as error:
            raise ConfigError(f"variant {self.name!r}, for {ranks} ranks: {error}") from error
        return parallel

    def ranks(self, there: int) -> int:
        """How many of the ranks it uses."""
        alone = self.way in ALONE or (self.way == "parafuse" and self.needs_ranks == 1 and not self.parallel)
        return 1 if alone or self.share_of > 1 else there


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, one call of it, and who runs it."""

    name: str
    theme: str
    """What its records are about, first in their names."""
    model: str
    """The built-in emoji, a diffusers folder, a hub id, or `random:` or `tiny:` and an architecture."""
    baseline: str
    """The variant that others are held against."""
    variants: tuple[Variant, ...]
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: str = "auto"
    """Unless --dtype says otherwise."""
    seed: int = 0
    rounds: int = 5
    """How often each variant is timed, unless --rounds says otherwise."""
    prompts: int = 0
    """Above 0: so many of the model's own prompts, each in a round of its own with noise of its own. There are as many
    rounds, and quality is over all of them."""
    warm_ups: int = 2
    """Requests before timing, the first one included."""
    whole_steps: int = 0
    """Above 0: a request of so many steps is extrapolated from the steps that are timed, and marked so."""
    link: dict[str, float] = field(default_factory=dict[str, float])
    """Of shares: bytes_per_s and latency_s of the modelled wire."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 2), ("warm_ups", 1), ("whole_steps", 0), ("prompts", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"case {self.name!r}: {name}={getattr(self, name)}: must be at least {least}.")
        self._check_prompts()
        reject_unknown(f"case {self.name!r}: link", self.link, ("bytes_per_s", "latency_s"))
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) or x < 0 for x in self.link.values()):
            raise ConfigError(f"case {self.name!r}: link={self.link}: must be numbers of at least 0.")
        if self.link.get("bytes_per_s", 1) == 0:
            raise ConfigError(f"case {self.name!r}: link={self.link}: bytes_per_s must be above 0.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"case {self.name!r}: dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}.")
        steps = self.call.get("num_inference_steps", 1)
        if 0 < self.whole_steps < steps:
            raise ConfigError(
                f"case {self.name!r}: whole_steps={self.whole_steps}: must be at least the {steps} that run."
            )
        own = next((v.name for v in self.variants if "num_inference_steps" in v.call), None)
        if own is not None and (self.whole_steps or self.largest_share > 1):
            raise ConfigError(
                f"case {self.name!r}: variant {own!r}: num_inference_steps cannot differ where requests are "
                "extrapolated or shares modelled; leave it to the case's call."
            )
        names = [variant.name for variant in self.variants]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ConfigError(f"case {self.name!r}: two variants are named {double!r}.")
        if self.baseline not in names:
            raise ConfigError(
                f"case {self.name!r}: baseline={self.baseline!r}: must be one of its variants, {', '.join(names)}."
            )

    def _check_prompts(self) -> None:
        if self.prompts == 1:
            raise ConfigError(f"case {self.name!r}: prompts=1: must be at least 2, or there is no spread; or 0.")
        if self.prompts and any("prompt" in call for call in (self.call, *(v.call for v in self.variants))):
            raise ConfigError(f"case {self.name!r}: prompts={self.prompts}: stands beside a prompt; leave one out.")
        if self.prompts and self.largest_share > 1:
            raise ConfigError(f"case {self.name!r}: prompts={self.prompts}: shares paint no pictures; leave one out.")

    @property
    def largest_share(self) -> int:
        """The largest world of which a share is measured; 1: none is."""
        return max(variant.share_of for variant in self.variants)

    def tiny(self) -> Case:
        """The same with tiny parts and their own small sizes. Raises ConfigError for a model that has no such form."""
        if not self.model.startswith(RANDOM):
            raise ConfigError(f"--tiny: case {self.name!r} measures {self.model!r}; only {RANDOM}NAME has a tiny form.")
        call = {name: value for name, value in self.call.items() if name in ("prompt", "output_type")}
        model = f"{TINY}{self.model.removeprefix(RANDOM)}"
        return replace(self, theme=f"{self.theme}-tiny", model=model, call=call, whole_steps=0)

    def without(self, names: list[str]) -> Case:
        """The same without these variants."""
        return replace(self, variants=tuple(v for v in self.variants if v.name not in names))

    def only(self, chosen: tuple[str, ...]) -> Case:
        """The same with these variants and the baseline. Raises ConfigError for a name that is none of them."""
        names = [variant.name for variant in self.variants]
        for name in chosen:
            if name not in names:
                raise ConfigError(
                    f"--variant {name!r}: {self.name} has {', '.join(names)}{nearest(name, names) or '.'}"
                )
        kept = tuple(v for v in self.variants if not chosen or v.name in (*chosen, self.baseline))
        return replace(self, variants=kept)


def load_case(name: str) -> Case:
    """A case by name, or from a TOML file. Raises ConfigError with what is wrong in it."""
    known = sorted(path.stem for path in CASES.glob("*.toml"))
    path = CASES / f"{name}.toml" if name in known else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise ConfigError(
            f"--case {name!r}: must be one of {', '.join(known)}, or a .toml file{nearest(name, known) or '.'}"
        )
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--case {name!r}: is no readable TOML ({error}).") from error
    return _case(path.stem, values)


def _case(name: str, values: dict[str, Any]) -> Case:
    given = {"name": name, "theme": name, **values}
    variants = given.pop("variant", [])
    _check(f"case {name!r}", given | {"variants": ()}, Case)
    if not isinstance(variants, list) or not variants:
        raise ConfigError(f"case {name!r}: has no [[variant]].")
    made: list[Variant] = []
    for entry in cast("list[dict[str, Any]]", variants):
        _check(f"case {name!r}: variant {entry.get('name')!r}", entry, Variant)
        made.append(Variant(**entry))
    return Case(**given, variants=tuple(made))


KINDS = {"str": str, "bool": bool, "int": int}


def _check(where: str, values: dict[str, Any], kind: type) -> None:
    """Raises ConfigError for keys that `kind` does not have, those that it needs, and values of other types."""
    fields: dict[str, Any] = kind.__dataclass_fields__
    reject_unknown(where, values, list(fields))
    for name, one in fields.items():
        required = one.default_factory is one.default  # both are MISSING
        if name not in values and required:
            raise ConfigError(f"{where}: {name} is missing.")
        wanted = KINDS.get(str(one.type))
        if name in values and wanted is not None and type(values[name]) is not wanted:
            raise ConfigError(f"{where}: {name}={values[name]!r}: must be of type {wanted.__name__}.")
        if name in values and str(one.type).startswith("dict") and not isinstance(values[name], dict):
            raise ConfigError(f"{where}: {name}={values[name]!r}: must be a table.")
