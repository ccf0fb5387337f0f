"""An engine on a disk: a diffusers folder, which plain diffusers loads too, and what parafuse has found beside it.

`parafuse/engine.json` has the plan and the versions; `parafuse/plans` how blocks are split; `parafuse/compiled` what
torch.compile has made. Another machine uses what fits it, and says what does not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from parafuse.config import Config
from parafuse.engine import artifacts, plan_store
from parafuse.engine.artifacts import machine
from parafuse.engine.kept import FOLDER_ENV
from parafuse.engine.plan import Plan
from parafuse.engine.quantize.saved import write_record
from parafuse.engine.quantized import compute_dtype
from parafuse.engine.receipt import versions
from parafuse.engine.source import locate, read_json, write_defaults
from parafuse.engine.state import components_of
from parafuse.errors import ConfigError, ModelError
from parafuse.hardware import num_cuda_devices
from parafuse.parallel.packed import inside
from parafuse.quantization import Quantize

FOLDER, RECORD, PLANS, COMPILED = "parafuse", "engine.json", "plans", "compiled"
SCHEMA = 1


@dataclass
class Saved:
    """What a folder holds beside the pipeline, and what of it can be used here."""

    plan: Plan | None
    config: Config
    used: dict[str, str] = field(default_factory=dict[str, str])
    """plan, block plans, compiled: one line each."""


def check(pipeline: Any) -> None:
    """Raises ConfigError for weights that a pipeline loaded from the folder would not have. Local; every rank calls
    it."""
    for name, part in components_of(pipeline).items():
        if isinstance(part, nn.Module):
            _refuse_unsaved(name, part)


def save(
    folder: Path,
    pipeline: Any,
    plan: Plan,
    defaults: dict[str, Any],
    block_plans: dict[str, Any],
    methods: Mapping[str, Quantize],
) -> None:
    """Writes all of it. One rank calls it.

    `block_plans`: key of the store -> (class of the block, plan). `methods`: component -> what it is quantized with."""
    pipeline.save_pretrained(folder)
    write_defaults(folder, defaults)
    own = folder / FOLDER
    shutil.rmtree(own, ignore_errors=True)
    (own / PLANS).mkdir(parents=True)
    for key, (block, block_plan) in block_plans.items():
        plan_store.write(own / PLANS, key, block, block_plan)
    if methods:
        dtypes = {name: compute_dtype(getattr(pipeline, name)) or "" for name in methods}
        write_record(folder, methods, dtypes)
    source = locate(str(folder), allow_pickle=True)
    record = {
        "schema": SCHEMA,
        "plan": _moved(plan, str(folder), source.model_id).to_dict(),
        "versions": versions(),
        "machine": machine(plan.device),
        "block_plans": len(block_plans),
    }
    (own / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    packed = artifacts.pack()
    if packed is not None:
        (own / COMPILED).write_bytes(packed[0])


def read(folder: Path, config: Config | None, size: int | None) -> Saved:
    """What can be used of a folder that `save` wrote, on `size` ranks; None: as many as the plan says. Block plans go
    to the user's cache of these, compiled code to torch's. Raises ModelError for another folder."""
    file = folder / FOLDER / RECORD
    if not file.is_file():
        raise ModelError(
            f"folder={str(folder)!r}: has no {FOLDER}/{RECORD}, so no engine was saved there. "
            "Engine.from_pretrained loads a diffusers folder."
        )
    record = read_json(file, str(folder))
    if record.get("schema") != SCHEMA:
        raise ModelError(f"folder={str(folder)!r}: schema {record.get('schema')!r}; this version reads {SCHEMA}.")
    plan = replace(Plan.from_dict(record["plan"]), model=str(folder))
    trusts = config is not None and config.allow_pickle
    is_other = config is not None and replace(config, allow_pickle=False) != Config()
    why_not = "another config is given" if is_other else _why_not(plan, size, folder, trusts=trusts)
    if why_not:
        saved = Saved(
            None, config if config is not None and is_other else Config(dtype=plan.dtype, allow_pickle=trusts)
        )
    else:
        saved = Saved(plan, Config(allow_pickle=trusts))
    saved.used["plan"] = f"not used: {why_not}" if why_not else "used"
    saved.used["block plans"] = _adopt_plans(folder / FOLDER / PLANS, record)
    saved.used["compiled"] = _adopt_compiled(folder / FOLDER / COMPILED, record, plan.device, saved.config)
    return saved


def _moved(plan: Plan, model: str, model_id: str) -> Plan:
    """The same for the same weights at another place, with what was measured of them."""
    measured = plan.calibration and plan.calibration | {"model": model, "model_id": model_id}
    return replace(plan, model=model, model_id=model_id, calibration=measured)


def _why_not(plan: Plan, size: int | None, folder: Path, *, trusts: bool) -> str:
    if locate(str(folder), allow_pickle=trusts).model_id != plan.model_id:
        return "the folder's configuration was changed"
    if size is not None and size != plan.world_size:
        return f"it is for {plan.world_size} ranks, here are {size}"
    devices = num_cuda_devices()
    if plan.device == "cuda" and devices < (plan.world_size if size is None else 1):
        return f"it is for {plan.world_size} CUDA devices, here are {devices}"
    return ""


def _adopt_plans(folder: Path, record: dict[str, Any]) -> str:
    files = sorted(folder.glob("*.json"))
    if not files:
        return "none were saved"
    for name, version in versions().items():
        if record["versions"].get(name) != version:
            return f"not used: made with {name} {record['versions'].get(name)}, here is {version}"
    where = plan_store.folder()
    if where is None:
        return f"not used: {FOLDER_ENV} is empty, so none are kept"
    try:
        where.mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (where / file.name).exists():
                part = where / f"{file.name}.{os.getpid()}.part"
                shutil.copy(file, part)
                part.replace(where / file.name)  # other ranks read it meanwhile
    except OSError as error:
        return f"not used: {where} cannot be written ({error.strerror})"
    return f"used: {len(files)}"


def _adopt_compiled(file: Path, record: dict[str, Any], device: str, config: Config) -> str:
    if not file.is_file():
        return "nothing was saved"
    here = machine(device)
    different = next((name for name in here if record["machine"].get(name) != here[name]), None)
    if different:
        return f"not used: made with {different} {record['machine'].get(different)!r}, here is {here[different]!r}"
    if not config.allow_pickle:
        return "not used: compiled code can do anything; Config(allow_pickle=True) if you trust its source"
    return "used" if artifacts.unpack(file.read_bytes()) else "not used: torch finds nothing in it"


def _refuse_unsaved(name: str, part: nn.Module) -> None:
    """Raises ConfigError for weights that a pipeline loaded from the folder would not have."""
    adapters = list(getattr(part, "peft_config", None) or ())
    if adapters:
        raise ConfigError(
            f"save: {name} has adapters ({', '.join(adapters)}), which a folder does not hold. fuse_lora() and then "
            "unload_lora_weights() keeps them in the weights; or unload them, and save_lora_weights()."
        )
    if any(x.is_meta for p in part.parameters() for x in inside(p)):
        raise ConfigError(f"save: {name} is offloaded; remove_all_hooks() first.")
    quantizer: Any = getattr(part, "hf_quantizer", None)
    is_packed = quantizer is not None and "torchao" not in str(quantizer.quantization_config.quant_method).lower()
    if not hasattr(part, "from_config") or is_packed:
        return
    with init_empty_weights(include_buffers=True):
        plain: Any = type(part).from_config(part.config)  # pyright: ignore[reportAttributeAccessIssue]
    more = sorted(part.state_dict().keys() - plain.state_dict().keys())
    if more:
        raise ConfigError(
            f"save: {name} has weights that its configuration does not make ({more[0]}, {len(more)} in all), which a "
            "folder does not hold. Take off what was added (unload_ip_adapter(), unfuse_qkv_projections()) first."
        )
