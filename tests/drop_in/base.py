"""What every pipeline has."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

import parafuse
from tests.drop_in.script import Script, Scripts, bare, effect, picture, processors, read, unchanged


def enable_attention_slicing(x: Any, _: Path) -> Any:
    return unchanged(x, lambda: x.enable_attention_slicing(1), lambda: processors(x))


def set_attention_slice(x: Any, _: Path) -> Any:
    return unchanged(x, lambda: x.set_attention_slice(1), lambda: processors(x))


def disable_attention_slicing(x: Any, _: Path) -> Any:
    x.enable_attention_slicing(1)
    return unchanged(x, x.disable_attention_slicing, lambda: processors(x))


def enable_xformers(x: Any, _: Path) -> Any:
    x.enable_xformers_memory_efficient_attention()


def disable_xformers(x: Any, _: Path) -> Any:
    """What xFormers had replaced gets torch's own processor."""
    x.disable_xformers_memory_efficient_attention()
    return [processors(x), picture(x)]


def set_xformers(x: Any, _: Path) -> Any:
    x.set_use_memory_efficient_attention_xformers(True)


def hooks(x: Any) -> list[str]:
    parts = bare(x).components.items()
    return sorted(f"{name} {type(part._hf_hook).__name__}" for name, part in parts if hasattr(part, "_hf_hook"))


def enable_model_cpu_offload(x: Any, _: Path) -> Any:
    return unchanged(x, lambda: x.enable_model_cpu_offload(device="cpu"), lambda: hooks(x))


def enable_sequential_cpu_offload(x: Any, _: Path) -> Any:
    return unchanged(x, lambda: x.enable_sequential_cpu_offload(device="cpu"), lambda: hooks(x))


def remove_all_hooks(x: Any, _: Path) -> Any:
    x.enable_model_cpu_offload(device="cpu")
    picture(x)
    return unchanged(x, x.remove_all_hooks, lambda: hooks(x))


def maybe_free_model_hooks(x: Any, _: Path) -> Any:
    """Puts the hooks on anew, and nothing where there is none."""
    x.maybe_free_model_hooks()
    assert not hooks(x)
    x.enable_model_cpu_offload(device="cpu")
    before = x.transformer._hf_hook
    x.maybe_free_model_hooks()
    assert x.transformer._hf_hook is not before
    return [hooks(x), picture(x)]


def enable_group_offload(x: Any, _: Path) -> Any:
    device = torch.device("cpu")
    x.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    assert any(hasattr(module, "_diffusers_hook") for module in bare(x).transformer.modules())
    return picture(x)


def reset_device_map(x: Any, _: Path) -> Any:
    bare(x).hf_device_map = {"transformer": "cpu"}
    x.reset_device_map()
    return [x.hf_device_map, picture(x)]


def register_modules(x: Any, _: Path) -> Any:
    """Another transformer, of the same shape: it must be made parallel in its turn."""
    from tests.drop_in.pipelines import BUILDERS

    other = BUILDERS["FluxPipeline"]().transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return effect(x, lambda: x.register_modules(transformer=other))


def register_to_config(x: Any, _: Path) -> Any:
    x.register_to_config(_name_or_path="elsewhere")
    return [x.name_or_path, picture(x)]


def progress_shown(x: Any) -> bool:
    """Whether a call writes a bar; the ranks after the first show none."""
    with redirect_stderr(io.StringIO()) as shown:
        picture(x)
    return "it/s" in shown.getvalue()


def set_progress_bar_config(x: Any, _: Path) -> Any:
    x.set_progress_bar_config(disable=False)
    rank = x.rank if isinstance(x, parafuse.Engine) else 0
    assert progress_shown(x) == (rank == 0)
    x.set_progress_bar_config(disable=True)
    return progress_shown(x)


def to(x: Any, _: Path) -> Any:
    assert x.to(torch.bfloat16) is x
    assert x.dtype == torch.bfloat16
    assert not isinstance(x, parafuse.Engine) or x.plan.dtype == "bfloat16"
    x.to("cpu", torch.float32)
    return [str(x.device), x.dtype, picture(x)]


def from_pipe(x: Any, _: Path) -> Any:
    from diffusers import FluxImg2ImgPipeline

    is_engine = isinstance(x, parafuse.Engine)
    new: Any = x.from_pipe(FluxImg2ImgPipeline) if is_engine else FluxImg2ImgPipeline.from_pipe(x)
    assert bare(new).transformer is bare(x).transformer
    start = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    call: dict[str, Any] = dict(
        prompt=["a cat", "the apple"], image=start, strength=0.9, num_inference_steps=3, output_type="latent"
    )
    call |= dict(num_inference_steps=3, height=8, width=12, max_sequence_length=9)
    call |= dict(generator=torch.Generator().manual_seed(3))
    return [new(**call).images, picture(x)]


def from_pretrained(x: Any, folder: Path) -> Any:
    if not isinstance(x, parafuse.Engine):
        return picture(x)
    x.save_pretrained(folder)
    x.world.share("a folder", lambda: 1)  # rank 0 has written it
    with x.from_pretrained(str(folder), parafuse.Config(parallel=parallel_of(x)), alone=x.world.size == 1) as engine:
        return picture(engine)


def parallel_of(engine: parafuse.Engine) -> parafuse.Parallel:
    return parafuse.Parallel(**engine.plan.degrees)


def from_config(x: Any, _: Path) -> Any:
    return type(x.from_config(dict(x.config), **x.components)).__name__


def save_pretrained(x: Any, folder: Path) -> Any:
    x.save_pretrained(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*") if path.is_file())
    return [files, picture(type(bare(x)).from_pretrained(folder))]


def save_config(x: Any, folder: Path) -> Any:
    x.save_config(folder)
    return json.loads((folder / "model_index.json").read_text())


def to_json_file(x: Any, folder: Path) -> Any:
    x.to_json_file(folder / "index.json")
    return (folder / "index.json").read_text()


def push_to_hub(x: Any, _: Path) -> Any:
    x.push_to_hub("nobody/nothing", token="none")


def download(x: Any, folder: Path) -> Any:
    return x.download("nobody/nothing", cache_dir=folder, local_files_only=True)


def load_config(x: Any, folder: Path) -> Any:
    folder /= str(x.rank if isinstance(x, parafuse.Engine) else 0)  # every rank writes
    bare(x).save_config(folder)
    return [x.load_config(folder), x.get_config_dict(folder)]


def progress_bar(x: Any, _: Path) -> Any:
    return [list(x.progress_bar([1, 2, 3])), x.progress_bar(total=2).total]


def numpy_to_pil(x: Any, _: Path) -> Any:
    array = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0)).numpy()
    return [image.tobytes() for image in x.numpy_to_pil(array)]


def components(x: Any, _: Path) -> Any:
    assert all(x.components[name] is getattr(bare(x), name) for name in x.components)
    return {name: type(part).__name__ for name, part in x.components.items()}


def scripts() -> Scripts:
    """Of `DiffusionPipeline`, on FLUX."""
    no_xformers = "for more information on how to install xformers"
    changes = {
        run.__name__: Script(run=run)
        for run in (
            enable_model_cpu_offload, remove_all_hooks, maybe_free_model_hooks, enable_group_offload, reset_device_map,
            register_modules, register_to_config, set_progress_bar_config, to, from_pipe,
            from_pretrained,
        )
    }  # fmt: skip
    sliced = (enable_attention_slicing, set_attention_slice, disable_attention_slicing)
    changes |= {run.__name__: Script(run=run, on="StableDiffusionXLPipeline") for run in sliced}
    writes = {run.__name__: Script(run=run, writes=True) for run in (save_pretrained, save_config, to_json_file)}
    reads = {run.__name__: Script(run=run, is_read=True) for run in (progress_bar, numpy_to_pil, components)}
    constants = "config config_name device dtype has_compatibles hf_device_map ignore_for_config".split()
    constants += ["model_cpu_offload_seq", "name_or_path"]
    on_two = {2: "cannot be split over 2 ranks"}
    return (
        changes
        | writes
        | reads
        | {name: read(name) for name in constants}
        | {
            "disable_xformers_memory_efficient_attention": Script(run=disable_xformers),
            "enable_xformers_memory_efficient_attention": Script(
                run=enable_xformers, raises=no_xformers, refused=on_two
            ),
            "set_use_memory_efficient_attention_xformers": Script(run=set_xformers, raises=no_xformers, refused=on_two),
            # accelerate's hooks take a device that is not the CPU.
            "enable_sequential_cpu_offload": Script(run=enable_sequential_cpu_offload, raises=r"new\(\) received"),
            "from_config": Script(run=from_config, refused=dict.fromkeys((1, 2), "makes another pipeline")),
            "register_for_auto_class": Script(
                run=lambda x, _: x.register_for_auto_class(), refused=dict.fromkeys((1, 2), "changes the class")
            ),
            "push_to_hub": Script(run=push_to_hub, raises="offline|Offline|HF_HUB_OFFLINE", writes=True),
            "download": Script(run=download, raises="Cannot load model|not found|offline|snapshot", is_read=True),
            "load_config": Script(run=load_config, is_read=True),
            "get_config_dict": Script(run=load_config, is_read=True),
            "extract_init_dict": Script(run=lambda x, _: sorted(x.extract_init_dict(dict(x.config))[0]), is_read=True),
            "parameters": Script(run=lambda x, _: x.parameters, is_read=True),
            "to_json_string": Script(run=lambda x, _: x.to_json_string(), is_read=True),
        }
    )
