"""Trains the FLUX transformer of `emoji` together with its two small text encoders.

`python train.py WORKDIR --steps 2376 546 2200`: three stages, first 64-pixel pictures (64 tokens, spread position ids),
then 128 pixels (256 tokens), then 128 pixels with the learning rate raised once more. Flow matching, bf16 autocast,
checkpoints in WORKDIR/checkpoint.pt (a rerun resumes).
`python train.py WORKDIR --export DIR` writes the pipeline in diffusers format from the averaged weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from data import phrases
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TEXT_LENGTH = 16  # T5 tokens
STAGES = (
    {"size": 64, "batch": 64, "rate": (1.0, 0.5)},
    {"size": 128, "batch": 32, "rate": (0.5, 0.02)},
    {"size": 128, "batch": 32, "rate": (0.5, 0.02)},
)  # rate: of LEARNING_RATE, at the stage's begin and end
LEARNING_RATE, TEXT_RATE = 1.5e-3, 5.0
DROP_CAPTION = 0.1
AVERAGE = 0.998
SAVE_EVERY_S = 240


class PlainAttention(TorchFunctionMode):
    """SDPA as two matrix products: forward and backward of 32 x 272 tokens in bf16 take 37 ms on two cores, the CPU's
    flash attention 86, its math attention 138."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or kwargs.get("attn_mask") is not None:
            return func(*args, **kwargs)
        q, k, v = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v


class TextAndTransformer(nn.Module):
    """The three trained components, as one module: token ids and noisy latents in, velocity out."""

    def __init__(self, clip_tokens: CLIPTokenizer, t5_tokens: T5Tokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokens), hidden_size=128, intermediate_size=256, num_hidden_layers=1,
                num_attention_heads=4, max_position_embeddings=16, projection_dim=128, hidden_act="quick_gelu",
                bos_token_id=clip_tokens.bos_token_id, eos_token_id=clip_tokens.eos_token_id,
                pad_token_id=clip_tokens.pad_token_id,
            )
        )  # fmt: skip
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokens), d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4,
                dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
                is_encoder_decoder=False, use_cache=False,
            )
        )  # fmt: skip
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=32, num_layers=4, num_single_layers=8, attention_head_dim=32,
            num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )  # fmt: skip

    def forward(self, clip_ids: Tensor, t5_ids: Tensor, x_BSD: Tensor, t_B: Tensor, img_ids: Tensor) -> Tensor:
        pooled = self.text_encoder(clip_ids).pooler_output
        text_BTD = self.text_encoder_2(t5_ids).last_hidden_state
        return self.transformer(
            hidden_states=x_BSD, timestep=t_B, encoder_hidden_states=text_BTD, pooled_projections=pooled,
            txt_ids=torch.zeros(text_BTD.shape[1], 3), img_ids=img_ids, return_dict=False,
        )[0]  # fmt: skip


def pack(z_NCHW: Tensor) -> Tensor:
    """FluxPipeline's packing: (N, C, H, W) -> (N, H/2 * W/2, 4C)."""
    n, c, h, w = z_NCHW.shape
    return z_NCHW.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def position_ids(side: int) -> Tensor:
    """(side * side, 3) ids that span the 16 x 16 grid of the full size whatever `side` is."""
    step = 16 / side
    axis = torch.arange(side) * step + (step - 1) / 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = axis[:, None], axis[None, :]
    return ids.view(side * side, 3)


class TrainingSet:
    """Packed latents and the token ids of every phrase of every caption; row -1 of the ids is the empty prompt."""

    def __init__(self, work: Path):
        config = json.loads((work / "vae" / "config.json").read_text())
        latents = torch.load(work / "latents.pt")
        self.packed = {s: pack((z - config["shift_factor"]) * config["scaling_factor"]) for s, z in latents.items()}
        self.clip = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.t5 = T5Tokenizer.from_pretrained(work / "tokenizer_2")
        self.captions = [row["caption"] for row in json.loads((work / "captions.json").read_text())]
        self.num_phrases = len(phrases(self.captions[0]))
        texts = [text for caption in self.captions for text in phrases(caption)] + [""]
        self.clip_ids = self.clip(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.t5_ids = self.t5(
            texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    def batch(self, size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(clip ids, t5 ids, packed latents): half of the rows say the bare caption, a tenth nothing."""
        rows = torch.randint(len(self.captions), (count,), generator=generator)
        phrase = torch.randint(self.num_phrases, (count,), generator=generator)
        phrase *= torch.rand(count, generator=generator) < 0.5
        text = rows * self.num_phrases + phrase
        text[torch.rand(count, generator=generator) < DROP_CAPTION] = -1
        return self.clip_ids[text], self.t5_ids[text], self.packed[size][rows]


def parameter_groups(model: TextAndTransformer) -> list[dict]:
    text = [p for name, p in model.named_parameters() if name.startswith("text_encoder")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("text_encoder")]
    return [{"params": rest, "scale": 1.0}, {"params": text, "scale": TEXT_RATE, "weight_decay": 0.0}]


def rate(stage: int, spent: float) -> float:
    """Half a cosine from the stage's first rate to its last, after a short warm-up; `spent` in 0..1."""
    begin, end = STAGES[stage]["rate"]
    warm = min(1.0, spent * 50 + 0.02)
    return LEARNING_RATE * warm * (end + (begin - end) * 0.5 * (1 + math.cos(spent * math.pi)))


def step_loss(model: nn.Module, data: TrainingSet, stage: int, generator: torch.Generator) -> Tensor:
    size, count = STAGES[stage]["size"], STAGES[stage]["batch"]
    clip_ids, t5_ids, x = data.batch(size, count, generator)
    t = torch.sigmoid(torch.randn(count, generator=generator) + 0.4)
    noise = torch.randn(x.shape, generator=generator)
    noisy = x + t[:, None, None] * (noise - x)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(clip_ids, t5_ids, noisy, t, position_ids(size // 8))
    return (velocity.float() - (noise - x)).square().mean()


class Run:
    """Model, averaged copy, optimizer and the place in the schedule; all of it is in the checkpoint."""

    def __init__(self, work: Path, data: TrainingSet):
        torch.manual_seed(0)
        self.path = work / "checkpoint.pt"
        self.model = TextAndTransformer(data.clip, data.t5)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator().manual_seed(1)
        self.stage, self.stage_steps, self.num_steps, self.curve = 0, 0, 0, []
        if self.path.exists():
            self.load()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "place": (self.stage, self.stage_steps, self.num_steps, self.curve),
        }  # fmt: skip

    def load(self) -> None:
        state = torch.load(self.path)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.stage, self.stage_steps, self.num_steps, self.curve = state["place"]

    def save(self) -> None:
        torch.save(self.state(), self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").rename(self.path)

    @torch.no_grad()
    def follow(self) -> None:
        decay = min(AVERAGE, (1 + self.num_steps) / (10 + self.num_steps))
        mine, theirs = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def step(self, data: TrainingSet, rate_now: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_now * group["scale"]
        with PlainAttention():
            loss = step_loss(self.model, data, self.stage, self.generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.num_steps += 1
        self.stage_steps += 1
        self.follow()
        return float(loss.detach())

    def train(self, data: TrainingSet, steps: list[int]) -> None:
        while self.stage < len(STAGES):
            losses, begun = [], time.monotonic()
            saved = begun
            while self.stage_steps < steps[self.stage]:
                losses.append(self.step(data, rate(self.stage, self.stage_steps / steps[self.stage])))
                if len(losses) == 100:
                    mean, seconds = sum(losses) / len(losses), time.monotonic() - begun
                    self.curve.append((self.stage, self.num_steps, seconds, mean))
                    print(f"stage {self.stage} step {self.num_steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
                    losses = []
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self.save()
                    saved = time.monotonic()
            self.stage, self.stage_steps = self.stage + 1, 0
            self.save()


def export(run: Run, data: TrainingSet, work: Path, folder: Path) -> None:
    """The averaged weights as a FluxPipeline in safetensors."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    average = run.average.eval()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=average.text_encoder, tokenizer=data.clip,
        text_encoder_2=average.text_encoder_2, tokenizer_2=data.t5,
        transformer=average.transformer,
    )  # fmt: skip
    # Half precision on disk, fp32 when loaded: so diffusers loads its own models; transformers keeps the file's dtype.
    for model in (pipeline.transformer, pipeline.vae):
        model.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.glob("*/config.json"):  # where the parts lay on this machine says nothing to others
        values = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(values, indent=2) + "\n")
    (folder / "captions.json").write_text(json.dumps(data.captions, indent=0))
    curve = [{"stage": s, "step": n, "loss": round(v, 5)} for s, n, _, v in run.curve]
    (folder / "training_curve.json").write_text(json.dumps(curve, indent=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, nargs=len(STAGES), default=[2376, 546, 2200], help="per stage")
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    data = TrainingSet(args.work)
    run = Run(args.work, data)
    if args.export:
        export(run, data, args.work, args.export)
    else:
        run.train(data, args.steps)


if __name__ == "__main__":
    main()
