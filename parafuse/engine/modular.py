"""What is different about a modular pipeline of diffusers: its call takes what its blocks take, and gives a state."""

from __future__ import annotations

from typing import Any

from parafuse.parallel.placeholder import settled


def takes_generator(pipeline: Any) -> bool:
    """Whether a call has use for a generator: a part of the blocks run by itself may draw no noise."""
    inputs = getattr(getattr(pipeline, "blocks", None), "inputs", None)
    return inputs is None or any(one.name == "generator" for one in inputs)


def continues(keywords: dict[str, Any]) -> bool:
    """Whether a call goes on from a state that has its generator."""
    values = getattr(keywords.get("state"), "values", None)
    return isinstance(values, dict) and values.get("generator") is not None


def settle_state(output: Any) -> Any:
    """The same state, with all its values. Collective where one is open."""
    values = getattr(output, "values", None)
    if isinstance(values, dict):
        values.update(settled(values))
    return output


def hush(pipeline: Any) -> None:
    """No progress bars: a pipeline passes that on to its own blocks, not to the loops in these."""
    pipeline.set_progress_bar_config(disable=True)
    waiting = [getattr(pipeline, "blocks", None)]
    while waiting:
        for block in getattr(waiting.pop(), "sub_blocks", {}).values():
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(disable=True)
            waiting.append(block)
