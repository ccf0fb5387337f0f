"""Whole pipelines with tiny random weights, as they lie on a disk: a diffusers folder, a single file, a hub cache."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SD35_HUB_ID = "stabilityai/stable-diffusion-3.5-large"
"""Where diffusers looks for the configuration of a single file with 38 joint blocks."""
SD35_BLOCKS = 38
WORDS = ("a", "red", "apple", "cat", "the")


def sd3(path: Path, *, num_layers: int = 2) -> Path:
    """Stable Diffusion 3: three text encoders, a transformer with joint attention, a picture of multiples of 4."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=num_layers, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    text_encoder = _clip(8, projection=8)
    nn.init.eye_(text_encoder.text_projection.weight)  # as a single file has it
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=text_encoder,
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(16, projection=16),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5("T5"),
        tokenizer_3=_t5_tokenizer(),
    )
    return _saved(pipeline, path)


def wan(path: Path) -> Path:
    """Wan 2.1, text to video: 4k + 1 frames of multiples of 16."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    pipeline = diffusers.WanPipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_t5("UMT5"),
        tokenizer=_t5_tokenizer(),
    )
    return _saved(pipeline, path)


def unet(path: Path) -> Path:
    """Stable Diffusion 1, as far as it is known without weights: configurations only."""
    import diffusers

    parts: dict[str, Any] = dict(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, sample_size=16,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=_vae(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    _saved(pipeline, path)
    for weights in path.glob("*/*.safetensors"):
        weights.unlink()
    return path


def _saved(pipeline: Any, path: Path) -> Path:
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            assert all(bool(p.isfinite().all()) for p in component.parameters()), name
    pipeline.save_pretrained(path)
    return path


def _vae(**more: Any) -> Any:
    """Pixels of 2 x 2 become one latent of 4 channels."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = dict(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return AutoencoderKL(**config, **more)


def _clip(width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16,
        vocab_size=len(_clip_words()), projection_dim=projection or width, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _clip_words() -> dict[str, int]:
    """Letters, and letters at the end of a word, after start and end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return {word: index for index, word in enumerate(words)}


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_clip_words(), merges=[], model_max_length=16)


def _t5(kind: str) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(_t5_words())
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _t5_words() -> list[tuple[str, float]]:
    letters = [(chr(code), -20.0) for code in range(33, 127)]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), *(("▁" + w, -1.0) for w in WORDS), *letters]


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=_t5_words(), extra_ids=0, model_max_length=64)


def single_file(folder: Path, file: Path) -> Path:
    """A Stable Diffusion 3 folder as one file, its weights under their original names."""
    from safetensors.torch import load_file, save_file

    def parts(name: str, weights: str = "model") -> dict[str, Tensor]:
        return load_file(folder / name / f"{weights}.safetensors")

    state = {f"text_encoders.clip_g.transformer.{name}": x for name, x in parts("text_encoder_2").items()}
    state |= {f"text_encoders.t5xxl.transformer.{name}": x for name, x in parts("text_encoder_3").items()}
    shared = "text_encoders.t5xxl.transformer.shared.weight"
    state[shared.replace("shared", "encoder.embed_tokens")] = state[shared].clone()
    clip_l = parts("text_encoder")
    del clip_l["text_projection.weight"]  # diffusers takes the identity
    state |= {f"text_encoders.clip_l.transformer.{name}": x for name, x in clip_l.items()}
    state |= {f"model.diffusion_model.{n}": x for n, x in _original_sd3(parts("transformer", _DIFFUSION)).items()}
    vae = parts("vae", _DIFFUSION)
    depth = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    for name, x in vae.items():
        original = _original_vae_name(name, depth)
        is_linear = ".mid.attn_1." in original and x.ndim == 2
        state[f"first_stage_model.{original}"] = x[:, :, None, None] if is_linear else x
    save_file({name: x.contiguous() for name, x in state.items()}, file)
    return file


_DIFFUSION = "diffusion_pytorch_model"
_SD3_NAMES = (
    ("pos_embed.pos_embed", "pos_embed"),
    ("pos_embed.proj.", "x_embedder.proj."),
    ("time_text_embed.timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("time_text_embed.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("time_text_embed.text_embedder.linear_1.", "y_embedder.mlp.0."),
    ("time_text_embed.text_embedder.linear_2.", "y_embedder.mlp.2."),
    ("norm_out.linear.", "final_layer.adaLN_modulation.1."),
    ("proj_out.", "final_layer.linear."),
    ("transformer_blocks.", "joint_blocks."),
    ("attn.norm_q.", "x_block.attn.ln_q."),
    ("attn.norm_k.", "x_block.attn.ln_k."),
    ("attn.norm_added_q.", "context_block.attn.ln_q."),
    ("attn.norm_added_k.", "context_block.attn.ln_k."),
    ("attn.to_out.0.", "x_block.attn.proj."),
    ("attn.to_add_out.", "context_block.attn.proj."),
    ("norm1.linear.", "x_block.adaLN_modulation.1."),
    ("norm1_context.linear.", "context_block.adaLN_modulation.1."),
    ("ff.net.0.proj.", "x_block.mlp.fc1."),
    ("ff.net.2.", "x_block.mlp.fc2."),
    ("ff_context.net.0.proj.", "context_block.mlp.fc1."),
    ("ff_context.net.2.", "context_block.mlp.fc2."),
)
"""diffusers' name, Stability's."""
_SD3_JOINED = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}


def _original_sd3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's weights as published: q, k and v in one; scale and shift of the last norms swapped."""
    weights = dict(weights)
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    swapped = [f"{name}.linear." for name in ("norm_out", f"transformer_blocks.{layers - 1}.norm1_context")]
    state: dict[str, Tensor] = {}
    for layer in range(layers):
        for block, names in _SD3_JOINED.items():
            for kind in ("weight", "bias"):
                joined = [weights.pop(f"transformer_blocks.{layer}.attn.{name}.{kind}") for name in names]
                state[f"joint_blocks.{layer}.{block}.attn.qkv.{kind}"] = torch.cat(joined)
    for name, x in weights.items():
        original = name
        for ours, theirs in _SD3_NAMES:
            original = re.sub(rf"(^|\.){re.escape(ours)}", rf"\1{theirs}", original)
        state[original] = torch.cat(x.chunk(2)[::-1]) if name.startswith(tuple(swapped)) else x
    return state


_VAE_NAMES: tuple[tuple[str, str | Callable[[re.Match[str], int], str]], ...] = (
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", lambda m, depth: f"up.{depth - 1 - int(m[1])}.block."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m, depth: f"up.{depth - 1 - int(m[1])}.upsample."),
    (r"mid_block\.resnets\.(\d+)\.", lambda m, _: f"mid.block_{int(m[1]) + 1}."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def _original_vae_name(name: str, depth: int) -> str:
    for ours, theirs in _VAE_NAMES:
        name = re.sub(ours, theirs if isinstance(theirs, str) else lambda m, f=theirs: f(m, depth), name)
    return name


def hub_cache(cache: Path, hub_id: str, folder: Path, *, weights: bool = True) -> Path:
    """What the hub's client keeps of a repository that it has downloaded; without weights: what a single file needs."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    ignored = None if weights else shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder, repository / "snapshots" / commit, ignore=ignored)
    return cache
