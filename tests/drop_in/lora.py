"""LoRA, as every one of the three pipelines has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.adapters import lora
from tests.drop_in.script import Run, Script, Scripts, bare, distance, effect, picture, read


def denoiser(x: Any) -> str:
    return "unet" if hasattr(bare(x), "unet") else "transformer"


def weights(x: Any, seed: int, name: str = "", rank: int = 2) -> dict[str, Any]:
    return lora(bare(x), [name or denoiser(x)], rank=rank, seed=seed, every=3)


def load(x: Any, *seeds: int) -> None:
    """Adapters `a1`, `a2` and so on."""
    for seed in seeds:
        x.load_lora_weights(weights(x, seed), adapter_name=f"a{seed}")


def with_adapters(*seeds: int) -> Callable[[Run], Run]:
    def decorated(run: Run) -> Run:
        def loaded(x: Any, folder: Path) -> Any:
            load(x, *seeds)
            return run(x, folder)

        loaded.__name__ = run.__name__
        return loaded

    return decorated


def load_lora_weights(x: Any, _: Path) -> Any:
    return effect(x, lambda: load(x, 1), undo=x.unload_lora_weights)


@with_adapters(1)
def unload_lora_weights(x: Any, _: Path) -> Any:
    return effect(x, x.unload_lora_weights, undo=lambda: load(x, 1))


@with_adapters(1, 2)
def set_adapters(x: Any, _: Path) -> Any:
    return effect(x, lambda: x.set_adapters(["a1", "a2"], [0.3, 0.7]))


@with_adapters(1)
def disable_lora(x: Any, _: Path) -> Any:
    return effect(x, x.disable_lora, undo=x.enable_lora)


@with_adapters(1)
def enable_lora(x: Any, _: Path) -> Any:
    x.disable_lora()
    return effect(x, x.enable_lora, undo=x.disable_lora)


@with_adapters(1)
def delete_adapters(x: Any, _: Path) -> Any:
    return effect(x, lambda: x.delete_adapters("a1"), undo=lambda: load(x, 1))


def fuse_lora(x: Any, _: Path) -> Any:
    """What is fused stays when the adapter goes."""
    plain = picture(x)
    load(x, 1)
    before = picture(x)
    x.fuse_lora(components=[denoiser(x)])
    x.unload_lora_weights()
    after = picture(x)
    assert distance(before, after) < 1e-4 < distance(plain, after)
    return [before, after]


@with_adapters(1)
def unfuse_lora(x: Any, _: Path) -> Any:
    before = picture(x)
    x.fuse_lora(components=[denoiser(x)])
    assert x.num_fused_loras == 1
    x.unfuse_lora(components=[denoiser(x)])
    return [before, picture(x), x.num_fused_loras]


@with_adapters(1)
def num_fused_loras(x: Any, _: Path) -> Any:
    x.fuse_lora(components=[denoiser(x)])
    return [x.num_fused_loras, sorted(x.fused_loras)]


def enable_lora_hotswap(x: Any, _: Path) -> Any:
    """Another adapter, of another rank, into the place of the first."""
    x.enable_lora_hotswap(target_rank=4)
    x.load_lora_weights(weights(x, 1), adapter_name="a")
    other = weights(x, 2, rank=3)
    return effect(x, lambda: x.load_lora_weights(other, adapter_name="a", hotswap=True))


@with_adapters(1, 2)
def get_active_adapters(x: Any, _: Path) -> Any:
    return [x.get_active_adapters(), x.get_list_adapters()]


@with_adapters(1)
def set_lora_device(x: Any, _: Path) -> Any:
    """One device is all there is; an adapter that is not there is an error."""
    x.set_lora_device(["a1"], "cpu")
    return picture(x)


def lora_state_dict(x: Any, _: Path) -> Any:
    return x.lora_state_dict(weights(x, 1))


def load_lora_into(x: Any, _: Path, part: str) -> Any:
    """Of the classes' own methods, which take the part."""
    given = weights(x, 1, part)
    kind = part if part in ("unet", "text_encoder") else "transformer"
    alphas = {} if kind == "transformer" and denoiser(x) == "transformer" and is_wan(x) else {"network_alphas": None}
    method = getattr(x, f"load_lora_into_{kind}")
    return effect(x, lambda: method(given, **alphas, **{kind: getattr(x, part)}, adapter_name="a1"))


def is_wan(x: Any) -> bool:
    return type(bare(x)).__name__ == "WanPipeline"


def layers(x: Any) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in weights(x, 1).items()}


def save_lora_weights(x: Any, folder: Path) -> Any:
    x.save_lora_weights(folder, **{f"{denoiser(x)}_lora_layers": layers(x)})
    return written(folder)


def write_lora_layers(x: Any, folder: Path) -> Any:
    x.write_lora_layers(
        state_dict=layers(x), save_directory=str(folder), is_main_process=True, weight_name=None, save_function=None,
        safe_serialization=True,
    )  # fmt: skip
    return written(folder)


def written(folder: Path) -> Any:
    from safetensors.torch import load_file

    return {path.name: load_file(path) for path in folder.iterdir()}


def pack_weights(x: Any, _: Path) -> Any:
    return x.pack_weights(layers(x), "transformer")


def scripts(*parts: str) -> Scripts:
    """`parts`: components for which a class has a method that loads into them."""
    changes = (
        load_lora_weights, unload_lora_weights, set_adapters, disable_lora, enable_lora, delete_adapters, fuse_lora,
        unfuse_lora, num_fused_loras, enable_lora_hotswap, get_active_adapters, set_lora_device,
    )  # fmt: skip
    found = {run.__name__: Script(run=run) for run in changes}
    found["fused_loras"], found["get_list_adapters"] = found["num_fused_loras"], found["get_active_adapters"]
    found |= {run.__name__: Script(run=run, is_read=True) for run in (lora_state_dict, pack_weights)}
    found |= {run.__name__: Script(run=run, writes=True) for run in (save_lora_weights, write_lora_layers)}
    found |= {f"load_lora_into_{part}": Script(run=partial(load_lora_into, part=part)) for part in parts}
    return found | {"lora_scale": read("lora_scale")}
