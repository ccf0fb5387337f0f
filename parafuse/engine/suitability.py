"""Whether a target can have what a config asks for, component by component: found before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from parafuse.cache import JOINT, SEPARATE, UNET, Cache, StackCache, cache_of
from parafuse.config import VAE_SHARDED, VAE_TILED, Axis
from parafuse.encoding import Encoding, encoding_of
from parafuse.engine.caches.choose import KINDS, fitting, refuse_kind
from parafuse.engine.caches.clock import schedulers_of
from parafuse.engine.devices import refuse_wrapped
from parafuse.engine.extras import Extras
from parafuse.engine.offload.pipeline import modules_in
from parafuse.engine.plan import Plan
from parafuse.engine.quantize.settle import TEXT_ENCODERS
from parafuse.engine.rewrites.choose import Beside, choices
from parafuse.engine.source import ModelSource
from parafuse.engine.stack import block_stack, repeated_blocks
from parafuse.engine.standing import Standing, standing_on
from parafuse.engine.targets import (
    AUTOENCODERS,
    DECODE,
    DENOISERS,
    STACKS,
    Wanted,
    autoencoders,
    denoisers,
    is_autoencoder,
    is_encoder,
    wanted_of,
)
from parafuse.engine.vae.tiled import has_tiling, refuse_without_tiling
from parafuse.errors import ConfigError
from parafuse.parallel.encoding import spread
from parafuse.parallel.hooks import is_overridden


def check_components(source: ModelSource, plan: Plan, given: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError for a pipeline that cannot run in this layout, or not with this cache, before its weights are
    loaded.

    `given`: components in the place of the model's own. A pipeline without any denoiser can run."""
    splits = plan.sequence_degree > 1
    there = {name for name in source.components or () if (given or {}).get(name, source) is not None}
    cache = cache_of(plan.cache or None)
    encoding = encoding_of(plan.text_encoders)
    asked = {f"offload={plan.offload!r}": plan.offload, "a placement": plan.placement,
             f"text_encoders={encoding.brief!r}": encoding.acts}  # fmt: skip
    what = next((name for name, value in asked.items() if value), "")
    if what and source.components is not None and not there & set(DENOISERS):
        way_out = "" if encoding.acts else ", and call enable_model_cpu_offload() on the engine"
        raise ConfigError(
            f"model={source.name!r}: has no denoiser, with which {what} is put on; leave it out{way_out}."
        )
    if source.components is not None and not there & set(TEXT_ENCODERS):
        _refuse_encoding(encoding)
    if cache is not None and there <= {*STACKS, *KINDS[UNET]} | (there - set(DENOISERS)):
        refuse_kind(cache, {kind for kind, names in KINDS.items() if there & set(names)}, source.name)
    if not splits or set(STACKS) & there or not set(DENOISERS) & there:
        return
    raise ConfigError(
        f"model={source.name!r}: has no transformer to split over ranks (UNets are not split); use cfg=2 for "
        "its guidance branches, data=N for several pictures, or one rank."
    )


def asked_for(target: Any, degrees: Mapping[Axis, int], encoding: Encoding, vae: str) -> list[Wanted]:
    """What it goes on. Raises ConfigError where there is nothing for it."""
    wanted = wanted_of(target, degrees.__getitem__, encoding, vae)
    _check_autoencoders(target, vae)
    if is_autoencoder(target):
        return wanted
    if not any(is_encoder(name) for name, _, _ in wanted):
        _refuse_encoding(encoding)
    if all(is_encoder(name) or method == DECODE for name, _, method in wanted):
        splits = degrees[Axis.RING] * degrees[Axis.ULYSSES] > 1
        denoisers(target, STACKS if splits else DENOISERS)  # says what is missing
    return wanted


def _refuse_encoding(encoding: Encoding) -> None:
    """Of a pipeline that has no text encoders."""
    if encoding.acts:
        raise ConfigError(
            f"text_encoders={encoding.brief!r}: there is none of {', '.join(TEXT_ENCODERS)} here; leave it out."
        )


def _check_autoencoders(target: Any, vae: str) -> None:
    """Raises ConfigError where there is none to share, or none with tiles."""
    if vae not in (VAE_TILED, VAE_SHARDED):
        return
    found = autoencoders(target)
    if not found:
        raise ConfigError(f"vae={vae!r}: there is none of {', '.join(AUTOENCODERS)} here; leave it out.")
    if vae == VAE_TILED and not any(has_tiling(module) for _, module in found):
        refuse_without_tiling(*found[0])


def whole(wanted: list[Wanted]) -> list[nn.Module]:
    """Denoisers on whose forward something stands."""
    return [module for name, module, method in wanted if method == "forward" and not is_encoder(name)]


def extras_for(
    extras: Extras, wanted: list[Wanted], target: Any, num_ranks: int
) -> dict[tuple[nn.Module, str], Extras]:
    """What each gets. Raises ConfigError where none can have the cache, or a rewrite."""
    encoders = [(name, module) for name, module, _ in wanted if is_encoder(name)]
    owners = spread([sum(p.nbytes for p in module.parameters()) for _, module in encoders], num_ranks)
    of_encoders = {module: extras.of_encoder(owner) for (_, module), owner in zip(encoders, owners, strict=True)}
    of_autoencoder = extras.of_autoencoder()
    extras = extras.of_denoiser()
    modules = [(name, module) for name, module, method in wanted if method == "forward" and not is_encoder(name)]
    cached = fitting(extras.cache, modules) if extras.cache is not None and wanted else ()
    beside = Beside(compile=extras.compile, quantize=extras.quantizes)
    chosen = choices(extras.rewrites, modules, target, beside) if extras.rewrites else []
    each = {module: choice for (_, module), choice in zip(modules, chosen, strict=False)}
    found: dict[tuple[nn.Module, str], Extras] = {}
    for name, module, method in wanted:
        fits = extras if name in cached else extras.without_cache()
        fits = fits.with_rewrites(each[module]) if module in each else fits
        fits = of_encoders.get(module, fits)
        found[module, method] = fits if method == "forward" else of_autoencoder
    return found


def check_target(target: Any, extras: Extras, device: str, degrees: Mapping[Axis, int]) -> None:
    """Raises ConfigError for what cannot be had on this target, before its parts are looked at."""
    _refuse_joint(extras.cache, target)
    extras.check(device, degrees.__getitem__)
    _refuse_gone(target)
    for name, module in modules_in(target) if extras.offload else ():
        refuse_wrapped(name, list(module.modules()))


def _refuse_gone(target: Any) -> None:
    """Raises ConfigError for weights that were cut between ranks and did not come back."""
    for name, module in modules_in(target):
        is_away = getattr(vars(module).get("to"), "parafuse_offloading", None) is not None
        if not is_away and any(x.numel() > 1 and not any(x.stride()) for x in module.parameters()):
            raise ConfigError(
                f"{name}: its weights were cut between ranks (offload: to=ranks), and are gone since that was taken "
                "off; load the model again, or give keep_originals=true the first time."
            )


def _refuse_joint(cache: Cache | None, target: Any) -> None:
    """Raises ConfigError for branches that are to decide together, where it cannot be told which belong together."""
    if isinstance(cache, StackCache) and cache.branches == JOINT and not schedulers_of(target):
        raise ConfigError(
            f"cache {cache.method}: branches={JOINT!r}: needs a pipeline, whose scheduler tells which samples of a "
            f"batch are branches of one; apply it to the pipeline, or use branches={SEPARATE!r}."
        )


def check_component(
    name: str, module: nn.Module, method: str, degrees: Mapping[Axis, int], extras: Extras
) -> Standing | None:
    """What stands on a component already, to be shared. Raises ConfigError where that, or something else, stands in the
    way."""
    one = standing_on(module, method)
    if one is not None:
        if any(one.mesh.degree(axis) != degrees[axis] for axis in Axis):
            raise ConfigError(
                f"{name}: runs with {_layout(one.mesh.degree)} already; call remove() on the handle of the first "
                f"apply, or give both the same degrees ({_layout(lambda axis: degrees[axis])} is asked for)."
            )
        if one.extras != extras:
            there, asked = (", ".join(each.lines()) or "nothing beside its layout" for each in (one.extras, extras))
            raise ConfigError(
                f"{name}: runs with {there} already; call remove() on the handle of the first apply, or give both the "
                f"same ({asked} is asked for)."
            )
        return one
    if method == "forward":
        refuse_wrapped(name, list(module.modules()))
        if is_overridden(module):
            raise ConfigError(f"target: parafuse is on {name} already; call remove() on the handle of the first apply.")
        if is_encoder(name):
            return None
        if degrees[Axis.RING] * degrees[Axis.ULYSSES] > 1 or extras.sparse is not None:
            block_stack(module)
        if extras.compile:
            repeated_blocks(module)
    return None


def _layout(degree: Callable[[Axis], int]) -> str:
    return ", ".join(f"{axis}={degree(axis)}" for axis in Axis if degree(axis) > 1) or "one rank"
