"""A transformer as a user might write it: unusual names, a key mask, rotary tables, grouped-query heads, no library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_SIZE = 8
Turns = tuple[Tensor, Tensor]


def turn(x_BHSD: Tensor, turns: Turns) -> Tensor:
    """Rotates halves of the features by (S, D/2) tables."""
    left, right = x_BHSD.chunk(2, dim=-1)
    cos, sin = turns
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Weave(nn.Module):
    """One block over one joint stream."""

    def __init__(self, heads: int, key_heads: int):
        super().__init__()
        width = heads * HEAD_SIZE
        self.grouped = heads != key_heads
        self.ask = nn.Linear(width, width)
        self.offer = nn.Linear(width, 2 * key_heads * HEAD_SIZE)
        self.ask_calm, self.key_calm = nn.RMSNorm(HEAD_SIZE), nn.RMSNorm(HEAD_SIZE)
        self.mood = nn.Linear(16, 2 * width)
        self.answer = nn.Linear(width, width)
        self.mull = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, strands: Tensor, *, spins: Turns, readable: Tensor, mood: Tensor) -> Tensor:
        scale, shift = self.mood(mood).unsqueeze(1).chunk(2, dim=-1)
        calm = F.layer_norm(strands, strands.shape[-1:]) * (1 + scale) + shift
        q = self.ask(calm).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        k, v = self.offer(calm).unflatten(-1, (2, -1, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        q, k = turn(self.ask_calm(q), spins), turn(self.key_calm(k), spins)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=readable, enable_gqa=self.grouped)
        strands = strands + self.answer(seen.transpose(1, 2).flatten(2))
        return strands + self.mull(strands)


class Weaver(nn.Module):
    """Words, then cloth, as one stream. Between blocks a depth is added and the tables are written into; at the end the
    words are cut away."""

    def __init__(self, heads: int, key_heads: int, depth: int = 3):
        super().__init__()
        width = heads * HEAD_SIZE
        self.from_cloth, self.from_words = nn.Linear(4, width), nn.Linear(16, width)
        self.depths = nn.Parameter(torch.zeros(depth, width))
        self.weaves = nn.ModuleList(Weave(heads, key_heads) for _ in range(depth))
        self.to_cloth = nn.Linear(width, 4)

    def forward(self, cloth: Tensor, words: Tensor, legible: Tensor, mood: Tensor) -> Tensor:
        strands = torch.cat([self.from_words(words), self.from_cloth(cloth)], dim=1)
        readable = F.pad(legible, (0, cloth.shape[1]), value=True)[:, None, None, :]
        places = torch.arange(strands.shape[1], device=cloth.device)[:, None]
        angles = places / 10.0 ** torch.linspace(0, 2, HEAD_SIZE // 2, device=cloth.device)
        spins = (angles.cos().to(cloth.dtype), angles.sin().to(cloth.dtype))
        for depth, weave in zip(self.depths, self.weaves, strict=True):
            strands = weave(strands + depth, spins=spins, readable=readable, mood=mood)
            for table in spins:
                table.mul_(0.9)
        return self.to_cloth(strands[:, words.shape[1] :])
