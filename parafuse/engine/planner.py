"""From `Config` to `Plan`: every "auto" resolved. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from parafuse.attention import attention_of
from parafuse.cache import cache_of, calibration_of, with_calibration
from parafuse.config import VAE_AUTO, VAE_BY_SIZE, VAE_REPLICATED, Axis, Config
from parafuse.engine.memory.check import check_memory
from parafuse.engine.placement.settle import computes_on_host, placed
from parafuse.engine.plan import Plan
from parafuse.engine.quantize.saved import saved_by
from parafuse.engine.quantize.settle import TEXT_ENCODERS, capability_here, settled
from parafuse.engine.timings import resolved
from parafuse.errors import ConfigError
from parafuse.hardware import num_cuda_devices
from parafuse.offload import offload_of, settled_on
from parafuse.quantization import Quantize, quantize_of

if TYPE_CHECKING:
    from parafuse.engine.source import ModelSource


def resolve(
    config: Config,
    source: ModelSource,
    world_size: int,
    given: Mapping[str, Any] | None = None,
    *,
    elsewhere: bool = False,
    why: str = "",
    chosen: bool = False,
) -> Plan:
    """The plan for `world_size` ranks. Raises ConfigError when the degrees or the device do not fit, when the cache
    was calibrated for another model, or when a placement cannot be had. `given`: the loader's keywords, with components
    that the user brings himself.

    `elsewhere`: it is for another machine, so what this one has does not matter. `why`: of degrees that were chosen
    (`planning.choose`); those that nobody has chosen are Ulysses' for all ranks that are left. `chosen`: nobody has
    named any of them."""
    degrees = config.parallel.degrees(world_size)
    if config.placement is None and not elsewhere:
        check_memory(source, config, world_size)
    calibration = calibration_of(with_calibration(cache_of(config.cache)))
    if calibration is not None and source.kind != "pipeline":  # of one that is loaded, `apply` looks at the denoiser
        calibration.check(model=source.name, model_id=source.model_id)
    device, dtype = computes_in(config, world_size, elsewhere=elsewhere)
    local, devices = ranks_here(world_size), num_cuda_devices()
    attention = resolved(attention_of(config.attention), device)
    if not why and config.parallel.ulysses == "auto" and degrees[Axis.ULYSSES] > 1:
        why = "ulysses takes all ranks that no other axis uses"
    if device == "cpu" and config.device == "auto" and devices:
        why += f"{'; ' if why else ''}on the CPU: {local} ranks here, but {devices} CUDA devices are visible"
    quantize = _settled(config, source, device, dtype, world_size, elsewhere)
    where = placed(
        config, source, device=device, dtype=dtype, quantize=quantize, local=local, given=given, elsewhere=elsewhere
    )
    why += f"{'; ' if why and where.why else ''}{where.why}"
    return Plan(
        model=source.name,
        model_id=source.model_id,
        world_size=world_size,
        degrees={str(axis): degree for axis, degree in degrees.items()},
        device=device,
        dtype=dtype,
        timeout_s=config.timeout_s,
        cache=str(config.cache or ""),
        quantize=str(quantize or ""),
        compile=config.compile,
        cuda_graphs=config.cuda_graphs,
        rewrites=config.rewrites,
        attention=attention.backend,
        sparse=str(config.sparse or ""),
        text_encoders=str(config.text_encoders),
        vae=_vae(config.vae, world_size),
        placement=where.homes,
        devices_per_rank=where.num_devices,
        offload_folder=(config.offload_folder or "") if where.homes else "",
        offload=str(settled_on(offload_of(config.offload), device) or ""),
        attention_timings=attention.timings.to_dict() if attention.timings is not None else None,
        calibration=calibration.to_dict() if calibration is not None else None,
        chosen=chosen,
        why=why,
    )


def ranks_here(world_size: int) -> int:
    """Of the ranks, those on this machine."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)


def computes_in(config: Config, world_size: int, *, elsewhere: bool = False) -> tuple[str, str]:
    """(device, dtype), with nothing left to be told. Raises ConfigError for CUDA devices that are not here."""
    local, devices = ranks_here(world_size), num_cuda_devices()
    is_here = devices >= local and not computes_on_host(config)
    device = config.device if config.device != "auto" else ("cuda" if is_here else "cpu")
    if device == "cuda" and devices < local and not elsewhere:
        ranks = "rank" if local == 1 else "ranks"
        raise ConfigError(
            f"device='cuda': {local} {ranks} on this machine, but {devices} CUDA devices are visible. "
            + (f"Start at most {devices} ranks here, or use device='cpu'." if devices else "Use device='cpu'.")
        )
    return device, config.dtype if config.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")


def _vae(asked: str, world_size: int) -> str:
    """The form of autoencoders: which of several ranks' forms pays is told by the size of each call."""
    if asked != VAE_AUTO:
        return asked
    return VAE_BY_SIZE if world_size > 1 else VAE_REPLICATED


def _settled(
    config: Config, source: ModelSource, device: str, dtype: str, world_size: int, elsewhere: bool
) -> Quantize | None:
    """The quantization with nothing left to be told. Raises ConfigError where it cannot be had."""
    method = quantize_of(config.quantize)
    if method is None:
        return None
    capability = capability_here() if device == "cuda" and not elsewhere else None
    return settled(
        method,
        device=device,
        capability=capability,
        dtype=dtype,
        world_size=world_size,
        saved=any(part not in TEXT_ENCODERS for part in saved_by(source)),
    )
