"""What `Engine.from_pretrained` takes beside the model, as data: every keyword of diffusers' loaders, and what becomes
of it. Torch-free; a documentation table is made of it, and a test holds it against the installed diffusers."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, REFUSED = "works", "refused"


@dataclass(frozen=True)
class Keyword:
    """One keyword of a loader."""

    verdict: str
    """works, or refused: by an error before any weight is loaded, unless it is given as None or False."""
    note: str
    """What becomes of it; for one that is refused why, and the way out."""
    code: str = ""
    """What the keyword is about."""


_HUB = "what diffusers makes of it; every rank is given the same"
_ONNX = "it is for ONNX pipelines, whose parts are no torch modules; load the torch weights"
_SPILL = "parts are read one by one, and none waits on the disk meanwhile; leave it out"

FROM_PRETRAINED: dict[str, Keyword] = {
    "dtype": Keyword(
        WORKS, "a dtype is taken for Config(dtype=...); a dict has one for each component, and a 'default'", "weights"
    ),
    "torch_dtype": Keyword(WORKS, "an older name of dtype", "weights"),
    "variant": Keyword(WORKS, "parts that have no files of it are loaded from their own, as in diffusers", "weights"),
    "use_safetensors": Keyword(WORKS, "False needs Config(allow_pickle=True)", "weights"),
    "quantization_config": Keyword(WORKS, "a PipelineQuantizationConfig; every rank quantizes for itself", "weights"),
    "low_cpu_mem_usage": Keyword(WORKS, "False is refused beside quantization_config", "weights"),
    "disable_mmap": Keyword(WORKS, "what diffusers makes of it", "weights"),
    "use_flashpack": Keyword(REFUSED, "files of flashpack are not read here; load the safetensors", "weights"),
    "dduf_file": Keyword(
        REFUSED, "diffusers has removed DDUF; unpack the file (it is a zip), and give the folder", "weights"
    ),
    "cache_dir": Keyword(WORKS, _HUB, "hub"),
    "force_download": Keyword(WORKS, _HUB, "hub"),
    "local_files_only": Keyword(WORKS, _HUB, "hub"),
    "proxies": Keyword(WORKS, _HUB, "hub"),
    "revision": Keyword(WORKS, _HUB, "hub"),
    "token": Keyword(WORKS, _HUB, "hub"),
    "mirror": Keyword(REFUSED, "diffusers reads it no more; set HF_ENDPOINT", "hub"),
    "custom_pipeline": Keyword(WORKS, "a file, folder or hub id needs trust_remote_code=True", "code"),
    "custom_revision": Keyword(WORKS, _HUB, "code"),
    "trust_remote_code": Keyword(WORKS, "what diffusers makes of it", "code"),
    "load_connected_pipeline": Keyword(WORKS, "what diffusers makes of it", "code"),
    "output_loading_info": Keyword(REFUSED, "diffusers' pipelines give none; leave it out", "code"),
    "device_map": Keyword(
        WORKS,
        "'cpu' and 'cuda' are taken for Config(device=...); 'balanced', 'auto' and maps for Config(placement=...), "
        "whose devices are counted within the rank",
        "place",
    ),
    "max_memory": Keyword(WORKS, "taken for Config(max_memory=...), beside a device_map", "place"),
    "offload_folder": Keyword(WORKS, "taken for Config(offload_folder=...), beside a device_map", "place"),
    "offload_state_dict": Keyword(REFUSED, _SPILL, "place"),
    "provider": Keyword(REFUSED, _ONNX, "onnx"),
    "provider_options": Keyword(REFUSED, _ONNX, "onnx"),
    "sess_options": Keyword(REFUSED, _ONNX, "onnx"),
    "use_onnx": Keyword(REFUSED, _ONNX, "onnx"),
}
"""Of `DiffusionPipeline.from_pretrained`. Components and other arguments of the pipeline's class are taken: objects,
None for what the pipeline does without, and values such as `requires_safety_checker`."""

_WHOLE = "a single file has no such choice; give a folder"
FROM_SINGLE_FILE: dict[str, Keyword] = {
    "dtype": Keyword(WORKS, "one for all parts; taken for Config(dtype=...)", "weights"),
    "torch_dtype": Keyword(WORKS, "an older name of dtype", "weights"),
    "disable_mmap": Keyword(WORKS, "what diffusers makes of it", "weights"),
    "config": Keyword(
        WORKS, "folder or hub id with the configuration, which otherwise follows from the keys", "config"
    ),
    "single_file_config": Keyword(WORKS, "the same, beside a parafuse.Config", "config"),
    "original_config": Keyword(WORKS, "YAML of the original code, for the parts of which diffusers reads it", "config"),
    "original_config_file": Keyword(REFUSED, "diffusers calls it original_config", "config"),
    "scaling_factor": Keyword(REFUSED, "diffusers ignores it; give config=... with the VAE's configuration", "config"),
    "load_safety_checker": Keyword(REFUSED, "give safety_checker=... and feature_extractor=... as objects", "config"),
    **{name: word for name, word in FROM_PRETRAINED.items() if word.code == "hub" and name != "mirror"},
    "device_map": FROM_PRETRAINED["device_map"],
    "low_cpu_mem_usage": Keyword(REFUSED, _WHOLE, "weights"),
    "variant": Keyword(REFUSED, _WHOLE, "weights"),
    "quantization_config": Keyword(
        REFUSED,
        "diffusers quantizes the parts of a single file one by one; give a folder, and "
        "transformer=X.from_single_file(file, quantization_config=...)",
        "weights",
    ),
    "use_safetensors": Keyword(REFUSED, "the file's ending says it; leave it out", "weights"),
    "custom_pipeline": Keyword(REFUSED, _WHOLE, "code"),
}
"""Of `from_single_file` of a pipeline, and those of `from_pretrained` that it would drop."""

FROM_NOTHING: dict[str, Keyword] = {
    name: FROM_PRETRAINED[name] for name in ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder")
}
"""Of an architecture without weights (`random:NAME`), beside its components."""


def keywords_of(kind: str) -> dict[str, Keyword]:
    """The keywords for a kind of model source."""
    return {"file": FROM_SINGLE_FILE, "random": FROM_NOTHING}.get(kind, FROM_PRETRAINED)
