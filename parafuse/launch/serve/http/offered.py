"""Which of a request's fields the model takes, what it does by itself, and the most that is taken."""

from __future__ import annotations

from typing import Any

from parafuse.launch.serve.card import ModelCard
from parafuse.launch.serve.settings import Serving

KEYWORDS = {
    "negative_prompt": ("negative_prompt",),
    "size": ("width", "height"),
    "steps": ("num_inference_steps",),
    "strength": ("strength",),
    "frames": ("num_frames",),
}
"""Field -> the keywords of the pipeline's call that it becomes, and that receipts have."""


def offered(settings: Serving, card: ModelCard) -> dict[str, Any]:
    """Part of what /v1/models says: `takes`, `defaults`, `most`."""
    keywords = KEYWORDS | ({} if card.guidance is None else {"guidance": (card.guidance,)})
    takes = {field: list(names) for field, names in keywords.items() if all(map(card.takes, names))}
    given = card.settings
    defaults = {
        field: given[names[0]] if len(names) == 1 else "x".join(str(given[name]) for name in names)
        for field, names in takes.items()
        if all(name in given for name in names)
    }
    most = {
        "prompt_characters": settings.max_prompt_characters, "pixels": settings.max_pixels,
        "steps": settings.max_steps,
    }  # fmt: skip
    most |= {"frames": settings.max_frames} if card.kind == "video" else {"n": settings.max_outputs}
    return {"takes": takes, "defaults": defaults, "most": most}
