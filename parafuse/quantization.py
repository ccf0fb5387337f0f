"""The quantizations that can be asked for: frozen, torch-free. Lossy: linear layers are computed or kept in 8 bits."""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from parafuse.errors import ConfigError
from parafuse.spelled import Spelled, chosen

NONE, AUTO = "none", "auto"
ROW, TENSOR, CALIBRATED = "row", "tensor", "calibrated"
FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability with fp8 matrix products: Ada; Hopper is 9.0."""
INT8_CAPABILITY = (8, 0)
BLOCK = {"fp8": 16, "int8": 8}
"""Both sizes of a linear layer must be multiples of so much for the matrix products of a method."""


@dataclass(frozen=True)
class Quantize(Spelled):
    """What all of them have in common. Weights have a scale for each row of outputs."""

    what: ClassVar[str] = "quantize"
    computes: ClassVar[bool]
    """Whether matrix products are done in 8 bits: what a layer is given is quantized too. Otherwise only what is kept
    is small."""
    block: ClassVar[int] = 1
    """Both sizes of a layer must be multiples of it."""

    text_encoders: str = dataclasses.field(default=NONE, kw_only=True)
    """The method for the layers of text encoders: fp8, fp8-weight, int8, int8-weight; none leaves them as they are."""
    skip: str = dataclasses.field(default="", kw_only=True)
    """Layers that are left as they are: full names with + between them, beginning with the component, where * stands
    for a number: transformer.single_transformer_blocks.*.proj_out."""
    min_features: int = dataclasses.field(default=128, kw_only=True)
    """Layers with fewer inputs or outputs are left as they are: they take little time and memory."""
    keep_originals: bool = dataclasses.field(default=False, kw_only=True)
    """Keep the weights as they were in the host's memory, so that remove() puts them back."""

    def __post_init__(self) -> None:
        self._check_word("text_encoders", (NONE, *METHODS))
        self._check("min_features", least=1)
        self._check_switch("keep_originals")
        if not isinstance(self.skip, str) or "," in self.skip:
            raise ConfigError(f"{self._named('skip')}: must be full names of layers with + between them.")

    @property
    def skipped(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.skip.split("+") if name.strip())

    def for_text_encoders(self) -> Quantize | None:
        """The same for text encoders; None where these are left as they are."""
        if self.text_encoders == NONE:
            return None
        kind = METHODS[self.text_encoders]
        names = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names} | {"text_encoders": NONE}
        if values.get("scale") == CALIBRATED:
            values["scale"] = ROW
        return kind(**values)


@dataclass(frozen=True)
class Fp8(Quantize):
    """Weights and what layers are given in fp8 (e4m3), products in fp8: faster where the GPU has it, and compiled."""

    method: ClassVar[str] = "fp8"
    computes: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK["fp8"]

    scale: str = dataclasses.field(default=AUTO, kw_only=True)
    """Of what layers are given: row (each token has its own, whatever stands beside it), tensor (one for a call: the
    picture then depends on what shares the call, so it is refused on several ranks) or calibrated (one for all calls,
    measured by parafuse quantize). auto: row, or where the GPU has no such products, tensor."""
    reference: bool = dataclasses.field(default=False, kw_only=True)
    """On a CPU, which has no fp8 products: compute what a GPU would, many times slower. To see what fp8 loses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_word("scale", (AUTO, ROW, TENSOR, CALIBRATED))
        self._check_switch("reference")


@dataclass(frozen=True)
class Fp8Weight(Quantize):
    """Weights kept in fp8 (e4m3), products in the model's own dtype: half the memory of 16 bits, not faster."""

    method: ClassVar[str] = "fp8-weight"
    computes: ClassVar[bool] = False


@dataclass(frozen=True)
class Int8(Quantize):
    """Weights and what layers are given in int8, products in int8: for GPUs without fp8 (Ampere), and CPUs."""

    method: ClassVar[str] = "int8"
    computes: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK["int8"]


@dataclass(frozen=True)
class Int8Weight(Quantize):
    """Weights kept in int8, products in the model's own dtype: half the memory of 16 bits, not faster."""

    method: ClassVar[str] = "int8-weight"
    computes: ClassVar[bool] = False


METHODS: dict[str, type[Quantize]] = {one.method: one for one in (Fp8, Fp8Weight, Int8, Int8Weight)}
ALLOWED = "a text such as 'fp8', a parafuse.Fp8 or another method, or None"


def quantize_of(value: Any) -> Quantize | None:
    """The quantization that a text names, or the value itself. Raises ConfigError with what is allowed."""
    return None if value is None else chosen("quantize", value, METHODS, ALLOWED)
