"""Features of pictures and prompts by a CLIP model, from a folder; and what is measured with them.

D: features. The cosines are taken here: torchmetrics' CLIPScore expects tensors of `get_image_features`, which gives
another kind of output since transformers 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from parafuse.errors import ModelError

BATCH = 16
"""Prompts or pictures at a time."""


class Clip:
    """A CLIP model in float32 and its processor, read from a folder alone."""

    def __init__(self, path: str, device: str) -> None:
        """Raises ModelError where the folder lacks a part, or weights."""
        from transformers import AutoProcessor, CLIPModel

        try:
            # Pillow scales as CLIP's authors did; torchvision, where it is installed, gives other figures
            processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True, backend="pil")
            loaded: Any = CLIPModel.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            model, found = loaded
            self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        except Exception as error:  # transformers has no error of its own for this
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(
                f"--clip {path!r}: a CLIP model and its processor cannot be loaded from it ({why})."
            ) from error
        lacking = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
        if lacking:
            raise ModelError(f"--clip {path!r}: its weights lack {len(lacking)} tensors, {lacking[0]} among them.")
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device = device
        self.most_tokens: int = model.config.text_config.max_position_embeddings

    @property
    def num_features(self) -> int:
        return self.model.config.projection_dim

    @torch.no_grad()
    def of_pictures(self, images: Sequence[Image]) -> Tensor:
        """(len(images), D), projected and not normalised."""
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return self.model.get_image_features(pixel_values=pixels).pooler_output.cpu()

    @torch.no_grad()
    def of_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(len(prompts), D), projected and not normalised. Longer prompts than the model takes are cut."""
        parts: list[Tensor] = []
        for start in range(0, len(prompts), BATCH):
            tokens = self.tokenizer(
                list(prompts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.most_tokens,
                return_tensors="pt",
            ).to(self.device)
            out = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            parts.append(out.pooler_output.cpu())
        return torch.cat(parts)

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are cut."""
        return sum(len(ids) > self.most_tokens for ids in self.tokenizer(list(prompts)).input_ids)


def clip_scores(pictures_ND: Tensor, prompts_ND: Tensor) -> list[float]:
    """100 times the cosine of each picture and its prompt, not cut off at 0. Hessel et al. 2021, arXiv:2104.08718."""
    return (100 * cosine_similarity(pictures_ND.double(), prompts_ND.double(), dim=-1)).tolist()


def directions(before_ND: Tensor, after_ND: Tensor, prompts_before_ND: Tensor, prompts_after_ND: Tensor) -> list[float]:
    """Cosine of the change of each picture and the change of its prompt, of features of length 1, as in diffusers'
    guide to evaluation. Gal et al. 2022, arXiv:2108.00946. No change at all gives 0."""
    unit = [normalize(x.double(), dim=-1) for x in (before_ND, after_ND, prompts_before_ND, prompts_after_ND)]
    return cosine_similarity(unit[1] - unit[0], unit[3] - unit[2], dim=-1).tolist()
