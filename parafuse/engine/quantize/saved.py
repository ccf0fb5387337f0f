"""What of a folder is quantized already, and whether it can run here; told before weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse.engine.quantize.settle import TEXT_ENCODERS, Capability, settled
from parafuse.engine.source import ModelSource, read_json
from parafuse.errors import ConfigError
from parafuse.quantization import AUTO, ROW, TENSOR, Fp8, Fp8Weight, Int8, Int8Weight, Quantize, quantize_of

if TYPE_CHECKING:
    from parafuse.engine.plan import Plan

RECORD = Path("parafuse") / "quantize.json"
"""In a folder: component -> the quantization, as its text, and under `dtypes` what each computed in. Configurations do
not tell calibrated scales from others."""
DTYPES = "dtypes"
KINDS: dict[str, type[Quantize]] = {
    "Float8DynamicActivationFloat8WeightConfig": Fp8,
    "Float8WeightOnlyConfig": Fp8Weight,
    "Int8DynamicActivationInt8WeightConfig": Int8,
    "Int8WeightOnlyConfig": Int8Weight,
}
"""torchao's name of a configuration -> what it is here."""


def configurations(source: ModelSource, given: Mapping[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(component, its quantization_config) of what a folder has quantized, whatever library did it."""
    for part in source.components or () if source.kind == "folder" else ():
        file = Path(source.path) / part / "config.json"
        if part not in (given or {}) and file.is_file():
            facts = read_json(file, source.name).get("quantization_config")
            if isinstance(facts, dict):
                yield part, facts


def saved_by(source: ModelSource, given: Mapping[str, Any] | None = None) -> dict[str, Quantize]:
    """Component -> what it was quantized with by torchao in a folder, of the methods that are known here."""
    record = _record(source)
    found: dict[str, Quantize] = {}
    for part, facts in configurations(source, given):
        default = facts.get("quant_type", {})
        default = default.get("default", {}) if isinstance(default, dict) else {}
        kind = KINDS.get(str(default.get("_type"))) if isinstance(default, dict) else None
        text = record.get(part)
        method = quantize_of(text) if isinstance(text, str) else None
        if method is None and kind is Fp8:
            method = Fp8(scale=ROW if "PerRow" in json.dumps(default.get("_data", {}).get("granularity")) else TENSOR)
        elif method is None and kind is not None:
            method = kind()
        if method is not None:
            found[part] = method
    return found


def _record(source: ModelSource) -> dict[str, Any]:
    file = Path(source.path) / RECORD if source.kind == "folder" else None
    return read_json(file, source.name) if file is not None and file.is_file() else {}


def _check_dtype(where: str, method: Quantize, made_in: Any, dtype: str) -> None:
    """Raises ConfigError for weights whose products are in the dtype that they were made in, where another is asked
    for: torchao does not cast them."""
    if not method.computes and made_in is not None and made_in != dtype:
        raise ConfigError(
            f"{where} in {method.method} from {made_in}, and is computed in that: give dtype={made_in}, or quantize "
            f"the model as it was with dtype={dtype}."
        )


def fits(there: Quantize, wanted: Quantize) -> bool:
    """Whether weights that are there are what is asked for."""
    scales = [getattr(one, "scale", AUTO) for one in (there, wanted)]
    return there.method == wanted.method and (AUTO in scales or scales[0] == scales[1])


def write_record(folder: Path, methods: Mapping[str, Quantize], dtypes: Mapping[str, str]) -> None:
    """Beside the components of a folder that has been saved. `dtypes`: what each component computes in. One rank calls
    it."""
    (folder / RECORD).parent.mkdir(exist_ok=True)
    texts = {part: str(_for_files(method)) for part, method in methods.items()}
    (folder / RECORD).write_text(json.dumps({**texts, DTYPES: dict(dtypes)}, indent=2) + "\n")


def _for_files(method: Quantize) -> Quantize:
    """Whether a CPU may compute it is no property of the weights, nor is what was kept beside them."""
    method = replace(method, keep_originals=False)
    return replace(method, reference=False) if isinstance(method, Fp8) else method


def check_saved(source: ModelSource, plan: Plan, given: Mapping[str, Any], capability: Capability | None) -> None:
    """Raises ConfigError for a folder whose quantized parts cannot run here, or are to be quantized otherwise."""
    asked = quantize_of(plan.quantize or None)
    dtypes = _record(source).get(DTYPES, {})
    for part, method in saved_by(source, given).items():
        _check_dtype(f"model={source.name!r}: {part} was quantized", method, dtypes.get(part), plan.dtype)
        wanted = asked.for_text_encoders() if asked and part in TEXT_ENCODERS else asked
        if wanted is not None and not fits(method, wanted):
            raise ConfigError(
                f"quantize={wanted.method}: {part} of {source.name!r} is saved in {method.brief}, and stays so; leave "
                "quantize out, or give the model as it was."
            )
        where = f"model={source.name!r}: {part} is saved in {method.method}"
        is_allowed = isinstance(wanted, Fp8) and wanted.reference
        if isinstance(method, Fp8) and plan.device == "cpu" and not is_allowed:
            raise ConfigError(
                f"{where}: a CPU has no fp8 matrix products (GPUs of compute capability 8.9 and later have). Give "
                "quantize='fp8:reference=true' to compute what a GPU would, many times slower."
            )
        try:
            settled(
                replace(method, reference=plan.device == "cpu") if isinstance(method, Fp8) else method,
                device=plan.device,
                capability=capability,
                dtype=plan.dtype,
                world_size=plan.world_size,
                saved=True,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
