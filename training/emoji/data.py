"""The training set of `emoji`: pictures, captions and tokenizers. CPU only, deterministic.

Pictures: npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT; Microsoft's Fluent Emoji, MIT).
Captions: the Unicode name of each code point, lower case (Python's unicodedata).
Run: `npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf *.tgz && python data.py package/assets WORKDIR`.
"""

from __future__ import annotations

import argparse
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

NUM_CAPTIONS = 512
SIZE = 128  # pixels; the package's pictures are 256 x 256
CLIP_LENGTH = 16  # tokens of the CLIP-type encoder, start and end included
DISTINCT_MSE = 0.008  # two pictures closer than this at 32 x 32 count as one
# Left out: near duplicates of each other that differ in a few pixels, or whose names say nothing of the picture.
SKIP_WORDS = (
    "clock face",
    "regional indicator",
    "keycap",
    "squared cjk",
    "circled ideograph",
    "digit",
    "square",
    "squared",
)
ALWAYS = (
    "red apple",
    "cactus",
    "octopus",
    "rocket",
    "fire",
    "crescent moon",
    "hamburger",
    "sailboat",
    "tulip",
    "dog face",
)


def caption_of(path: Path) -> str | None:
    """Unicode name of a one-code-point emoji, lower case; None for sequences and unnamed points."""
    points = [p for p in path.stem.split("-") if p != "fe0f"]
    if len(points) != 1:
        return None
    name = unicodedata.name(chr(int(points[0], 16)), "").lower().replace("-", " ")
    return None if not name or any(word in name for word in SKIP_WORDS) else name


def read_picture(path: Path, size: int) -> np.ndarray:
    """RGB uint8 (size, size, 3), composed on white."""
    rgba = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def choose(assets: Path, count: int) -> list[tuple[str, Path]]:
    """`count` (caption, file) pairs that are told apart at 32 x 32, in a fixed shuffled order."""
    named = {}
    for path in sorted(assets.glob("*.webp")):
        caption = caption_of(path)
        if caption:
            named.setdefault(caption, path)
    order = sorted(named)
    random.Random(0).shuffle(order)
    order.sort(key=lambda caption: caption not in ALWAYS)
    kept: list[tuple[str, Path]] = []
    small: list[np.ndarray] = []
    for caption in order:
        thumb = read_picture(named[caption], 32).astype(np.float32) / 255
        if all(np.mean((thumb - other) ** 2) > DISTINCT_MSE for other in small):
            kept.append((caption, named[caption]))
            small.append(thumb)
        if len(kept) == count:
            return kept
    raise SystemExit(f"only {len(kept)} distinct pictures, {count} wanted")


def phrases(caption: str) -> list[str]:
    """The ways in which a caption is said in training."""
    article = "an" if caption[0] in "aeiou" else "a"
    return [caption, f"{article} {caption}", f"the {caption}", f"an emoji of {article} {caption}", f"{caption} emoji"]


def clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Byte-level BPE in which every word of the captions is one token; any other text falls to bytes."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, initial_alphabet=sorted(ByteLevel.alphabet()), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [start, end]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(texts: list[str]) -> T5Tokenizer:
    """Unigram over the captions' words, then single characters; what is neither is <unk>."""
    words = Counter(word for text in texts for word in text.split())
    chars = sorted({c for text in texts for c in text if c != " "} | set(map(chr, range(33, 127))))
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocab += [("▁" + word, -1.0) for word in sorted(words)]
    vocab += [(c, -20.0) for c in chars]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = choose(args.assets, NUM_CAPTIONS)
    captions = [caption for caption, _ in pairs]
    pictures = np.stack([read_picture(path, SIZE) for _, path in pairs])
    texts = [text for caption in captions for text in phrases(caption)]
    clip_tokenizer(texts).save_pretrained(args.out / "tokenizer")
    t5_tokenizer(texts).save_pretrained(args.out / "tokenizer_2")
    torch.save(torch.from_numpy(pictures), args.out / "pictures.pt")
    rows = [{"caption": caption, "file": path.name} for caption, path in pairs]
    (args.out / "captions.json").write_text(json.dumps(rows, indent=0))
    print(f"{len(rows)} pictures of {SIZE} pixels; longest caption {max(len(c.split()) for c in captions)} words")


if __name__ == "__main__":
    main()
