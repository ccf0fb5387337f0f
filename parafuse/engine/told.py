"""What stood on a pipeline in one request, and what it did: the part of the receipt that handles tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from parafuse.config import Axis
from parafuse.engine.apply import Handle
from parafuse.engine.quantize.report import report as quantized
from parafuse.engine.vae.choice import DECODING
from parafuse.log import note
from parafuse.parallel.comm import Count, since

Seen = dict[Any, Counter[str]]
"""What shares calls -> what it had seen before the request."""


def seen_by(handle: Handle) -> Seen:
    return {one: Counter(one.seen) for one in (*handle.guidance.values(), *handle.data.values())}


def told_by(handle: Handle, seen: Seen) -> dict[str, Any]:
    """Of denoising. `seen`: as it was before the request."""
    return {
        "quantized": quantized(handle.quantized.values()),
        "applied": list(handle.applied),
        "attention": {name: one.report() for name, one in handle.choices().items()},
        "sparse": {name: one.attention.report() for name, one in handle.sparse().items()},
        "text_encoders": {name: dict(one.seen) for name, one in handle.encoders().items()},
        "guidance": {name: one.report(seen[one]) for name, one in handle.guidance.items()},
        "data": {name: one.report(seen[one]) for name, one in handle.data.items()},
        "offload": handle.offloading.ledger.report() if handle.offloading is not None else None,
    }


def exchanged_since(handle: Handle, before: Mapping[str, Count], *, decoding: bool = False) -> dict[str, Any]:
    """What has gone between ranks since, by axis and kind: of autoencoders, or of all else."""
    found = since(handle.exchanged(), before)
    return {
        name: vars(count)
        for name, count in found.items()
        if count.calls and name.startswith(f"{DECODING}.") is decoding
    }


def say_idle(handle: Handle, seen: Seen) -> None:
    """One line for an axis on which this request had nothing to share."""
    for axis, parts in ((Axis.CFG, handle.guidance), (Axis.DATA, handle.data)):
        new = sum(((one.seen - seen[one]) for one in parts.values()), Counter[str]())
        if parts and not new["cut"] and not new["together"]:
            degree = handle.mesh.degree(axis) if handle.mesh else 1
            note(f"{axis} {degree}: nothing could be shared in this request; its ranks did the same")
