"""Measures which linear layers of repeated blocks see one row for each sample, in every transformer class of diffusers.

python -m tests.quantize.roles writes parafuse/engine/quantize/roles.json."""

from __future__ import annotations

import json
from collections import defaultdict

import torch
from torch import nn

from parafuse.engine.quantize.roles import FILE, pattern_of
from parafuse.engine.stack import named_blocks
from tests.zoo.case import Case
from tests.zoo.collect import cases, inputs_of, outputs, randomized

SAMPLES = 2
"""In every case of the zoo; no stream has so few tokens."""


def seen(case: Case) -> dict[str, set[bool]]:
    """Name with * for numbers -> whether the layer was given one row for each sample, in each of its calls."""
    model = randomized(case.build()).eval()
    found: dict[str, set[bool]] = defaultdict(set)

    def watch(name: str, layer: nn.Linear) -> None:
        def note(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].numel() // layer.in_features
            found[pattern_of(name)].add(rows == SAMPLES)

        layer.register_forward_pre_hook(note)

    for block, module in named_blocks(model).items():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                watch(f"{block}.{name}", layer)
    outputs(model, inputs_of(case, case.sizes))
    return found


def measure() -> dict[str, list[str]]:
    """Class -> names of such layers, over all configurations of it."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, case in cases().items():
        found[name.partition(":")[0]] |= {pattern for pattern, ones in seen(case).items() if True in ones}
    return {name: sorted(patterns) for name, patterns in sorted(found.items())}


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure(), indent=1) + "\n")
    print(FILE)
