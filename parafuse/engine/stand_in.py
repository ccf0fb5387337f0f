"""Tokenizers and processors for architectures without weights, which come without vocabularies.

A stand-in has the ids of the real one's special tokens, its limits, padding and chat template. Its words are those that
the pipeline itself puts around a prompt, one token each, so that these are cut off where the pipeline expects it;
everything else is read byte by byte, a token each.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from parafuse.errors import ConfigError

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How text is cut before tokens are looked up: words with the space before them, digits, signs, ends of lines."""


def make_tokenizer(stand_in: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A transformers tokenizer made in memory.

    `stand_in`: `special` token -> id; `words`, a text whose words are tokens; `begin` and `end`, the special tokens
    around every text; `first_piece`, the smallest id of a token that is not special. `settings`: as in the real one's
    tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special: dict[str, int] = stand_in["special"]
    cut = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    words = dict.fromkeys(piece for piece, _ in cut.pre_tokenize_str(stand_in.get("words", "")))
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(word for word in words if len(word) > 1)]
    free = (number for number in count(stand_in.get("first_piece", 0)) if number not in special.values())
    vocabulary = dict(special) | dict(zip(pieces, free, strict=False))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    begin, end = stand_in.get("begin", []), stand_in.get("end", [])
    if begin or end:
        around = [(token, special[token]) for token in dict.fromkeys([*begin, *end])]
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], pair=[*begin, "$A", "$B", *end], special_tokens=around
        )
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


class PictureProcessor:
    """Text with pictures, as a vision-language model takes them: a picture's place in the text is as many tokens long
    as the model makes of the picture."""

    def __init__(self, tokenizer: Any, image_processor: Any, image_token: str):
        self.tokenizer, self.image_processor, self.image_token = tokenizer, image_processor, image_token

    def __call__(self, text: list[str], images: Any = None, *, padding: Any = True, return_tensors: str = "pt") -> Any:
        """input_ids, attention_mask, and the pictures' pixel_values and image_grid_thw."""
        from transformers import BatchFeature

        seen: dict[str, Any] = {}
        if images is not None:
            seen = dict(self.image_processor(images=images, return_tensors=return_tensors))
            text = self._with_places(text, seen["image_grid_thw"])
        tokens = self.tokenizer(text, padding=padding, return_tensors=return_tensors)
        return BatchFeature(data={**tokens, **seen})

    def _with_places(self, texts: list[str], grids: Any) -> list[str]:
        """The texts with every picture's place as long as its picture, in their order."""
        sizes = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in grids]
        places = sum(text.count(self.image_token) for text in texts)
        if places != len(sizes):
            raise ConfigError(f"image: {len(sizes)} given for {places} prompts; give one for each.")
        lengths = iter(sizes)
        out: list[str] = []
        for text in texts:
            first, *rest = text.split(self.image_token)
            out.append(first + "".join(self.image_token * next(lengths) + piece for piece in rest))
        return out
