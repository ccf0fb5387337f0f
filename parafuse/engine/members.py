"""What becomes of each method and property of a diffusers pipeline when it is used on an engine: data, and one rule.

The rule: a method runs on every rank, after the ranks have compared its arguments; a property is read where it is asked
for. Named here is what must not follow it. docs/drop-in.md shows what each one does, as its tests found it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from parafuse.config import Axis
from parafuse.engine.plan import Plan
from parafuse.offload import Offload, offload_of
from parafuse.placement import placed_weights, placement_of


class Way(Enum):
    """How a member of the pipeline is reached."""

    EVERYWHERE = "on every rank"
    HERE = "on the rank that asks, alone: it changes nothing"
    WRITES = "on rank 0 alone: it writes files, the same on every rank"


HERE = frozenset(
    (
        # of a pipeline
        *"numpy_to_pil progress_bar to_json_string check_inputs maybe_convert_prompt pack_weights".split(),
        *"get_active_adapters get_list_adapters lora_state_dict get_config_dict load_config extract_init_dict".split(),
        *"download get_guidance_scale_embedding prepare_extra_step_kwargs".split(),
        # of a module
        *"parameters named_parameters buffers named_buffers modules named_modules children named_children".split(),
        *"state_dict get_submodule get_parameter num_parameters".split(),
    )
)
WRITES = frozenset("save_pretrained save_config to_json_file push_to_hub save_lora_weights write_lora_layers".split())
ANOTHER = "makes another pipeline, which would run on this rank alone"
OTHER_WAYS = {
    "from_single_file": f"{ANOTHER}; parafuse.Engine.from_pretrained takes the file",
    "register_for_auto_class": "changes the class, for all pipelines of it; call it on the class",
    "from_config": f"{ANOTHER}; make it first, then parafuse.Engine.from_pipeline(pipeline)",
}
XFORMERS = ("enable_xformers_memory_efficient_attention", "set_use_memory_efficient_attention_xformers")
MOVES = ("enable_model_cpu_offload", "enable_group_offload")
OFFLOADS = (
    "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "enable_layerwise_casting",
)  # fmt: skip
"""diffusers' own ways to keep weights elsewhere, or in another dtype."""
FUSES = ("fuse_lora", "unfuse_lora", "fuse_qkv_projections", "unfuse_qkv_projections")
PARTS = {
    "enable_vae_slicing": ("vae", "enable_slicing"),
    "disable_vae_slicing": ("vae", "disable_slicing"),
    "enable_vae_tiling": ("vae", "enable_tiling"),
    "disable_vae_tiling": ("vae", "disable_tiling"),
}
"""Methods that pipelines had and their parts have now."""


def way_of(name: str) -> Way:
    """How a method of this name is reached."""
    if name in WRITES:
        return Way.WRITES
    return Way.HERE if name in HERE else Way.EVERYWHERE


def beside_offload(name: str, offload: Offload) -> str:
    """Why one of `OFFLOADS` cannot be called beside an offload of parafuse."""
    if name == CASTING:
        return (
            f"it casts weights before and after each layer runs, and {offload.said} moves them then; use "
            "quantize='fp8-weight' beside offload, or leave offload out"
        )
    return (
        f"{offload.said} keeps the weights elsewhere already; leave one of both out (where the Config has no "
        "offload and no placement, this call is diffusers' own)"
    )


CASTING = "enable_layerwise_casting"


def beside_casting(*, compile: bool, rewrites: Sequence[str], packed: str) -> str | None:
    """Why diffusers' layer-wise casting, which casts the weights of a layer before and after it runs, cannot stand
    beside what a Config asks for; None where it can."""
    if packed:
        return f"weights are in {packed} already; leave the call out, or quantize"
    if compile:
        return (
            "it makes new weights for each call of a layer, which no compiled block can look through; use "
            "quantize='fp8-weight', which keeps weights in 8 bits and compiles, or leave compile out"
        )
    reads = ",".join(name for name in rewrites if name in ("modulation", "qkv", "auto"))
    if reads:
        return (
            f"rewrites={reads!r} reads weights of layers between their calls, where these are cast; leave {reads} out, "
            "or use quantize='fp8-weight'"
        )
    return None


def refusal(name: str, plan: Plan, args: tuple[object, ...] = (), *, part: str = "", packed: str = "") -> str | None:
    """Why a method of the pipeline, or of a part of it, cannot be called under this plan, and the way out; None where
    it can. `packed`: the
    method in which weights are quantized, where they are."""
    if name in OTHER_WAYS and not part:
        return OTHER_WAYS[name]
    if name == "enable_sequential_cpu_offload" and packed:
        return (
            f"accelerate moves weights one by one, and cannot move those in {packed}; use "
            "enable_model_cpu_offload, or enable_group_offload of the parts"
        )
    offload = offload_of(plan.offload or None) or placed_weights(
        placement_of(plan.config().placement), plan.offload_folder or None, plan.device
    )
    if name in OFFLOADS and offload is not None:
        return beside_offload(name, offload)
    if name == CASTING:
        return beside_casting(compile=plan.compile, rewrites=plan.rewrites.split(","), packed=packed)
    if name in MOVES and packed and plan.compile:
        return (
            f"torch moves weights in {packed} by swapping tensors, which it cannot where compiled blocks watch them; "
            "leave compile or quantize out, or offload nothing: weights in 8 bits take half the memory"
        )
    if name in FUSES and packed:
        return (
            f"weights in {packed} cannot be added to or joined; fuse before quantizing (Engine.from_pipeline of a "
            "pipeline with fused LoRAs), or leave LoRAs as adapters, which work"
        )
    splits = plan.degree(Axis.RING) * plan.degree(Axis.ULYSSES)
    if name in XFORMERS and args[:1] != (False,) and splits > 1:
        return (
            f"xFormers' operator cannot be split over {splits} ranks of a sequence; torch's own attention, which is "
            "on, needs as little memory. Leave the call out, or use parallel.cfg or parallel.data for the ranks"
        )
    return None
