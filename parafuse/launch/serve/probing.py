"""The short call that shows that a model's ranks work. Torch-free."""

from __future__ import annotations

from parafuse.launch.serve.card import ModelCard
from parafuse.launch.serve.group_supervisor import Probe
from parafuse.launch.serve.messages import Item, Paint

STEPS = 2
PROMPT = "a red apple"


def probe_of(card: ModelCard, *, every_s: float = 60.0) -> Probe:
    """One picture, in which every rank has a part, whatever the layout: replicas without a picture of their own compute
    what others do."""
    settings = {"num_inference_steps": STEPS} if card.takes("num_inference_steps") else {}
    form = "mp4" if card.kind == "video" else "png"
    item = Item(job="probe", prompt=PROMPT, seed=0)
    return Probe(call=Paint(call="probe", items=(item,), settings=settings, format=form), every_s=every_s)
