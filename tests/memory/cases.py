"""What is predicted and then measured, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BIG = {"height": 192, "width": 256}


@dataclass(frozen=True)
class Case:
    """A request of a model in a layout."""

    model: str
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the Config, degrees too."""
    call: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        more = [
            f"{key}={value}" for key, value in {**self.options, **self.call}.items() if key != "num_inference_steps"
        ]
        return ", ".join([f"{self.model}, {self.ranks} rank{'s' * (self.ranks > 1)}", *more])


ALONE = (
    Case("emoji"),
    Case("emoji", call={"num_images_per_prompt": 3}),
    Case("tiny:flux.1-dev", call=BIG),
    Case("tiny:sd3.5-large", call=BIG),
    Case("tiny:sdxl", call=BIG),
    Case("tiny:wan2.1-14b"),
    Case("tiny:hunyuanvideo"),
    Case("tiny:qwen-image", call=BIG),
    Case("tiny:z-image-turbo", call=BIG),
    Case("tiny:flux.2-dev", call=BIG),
)
SHARED = (
    Case("emoji", 2),
    Case("emoji", 3),
    Case("emoji", 4, {"ulysses": 2, "ring": 2}),
    Case("emoji", 2, {"ring": 2}),
    Case("emoji", 2, {"cfg": 2}),
    Case("emoji", 2, {"data": 2}, {"num_images_per_prompt": 2}),
    Case("tiny:flux.1-dev", 3, {}, BIG),
    Case("tiny:sd3.5-large", 2, {}, BIG),
    Case("tiny:sd3.5-large", 4, {"cfg": 2}, BIG),
    Case("tiny:sdxl", 2, {"cfg": 2}, BIG),
    Case("tiny:sdxl", 2, {"data": 2}, {**BIG, "num_images_per_prompt": 2}),
    Case("tiny:wan2.1-14b", 3),
    Case("tiny:wan2.1-14b", 4, {"cfg": 2, "ring": 2}),
    Case("tiny:hunyuanvideo", 2),
    Case("tiny:hunyuanvideo", 4),
)
EXTRAS = (
    Case("emoji", 1, {"cache": "first-block:0.1"}, {"num_inference_steps": 6}),
    Case("emoji", 1, {"cache": "taylorseer:3"}, {"num_inference_steps": 6}),
    Case("emoji", 2, {"cache": "first-block:0.1"}, {"num_inference_steps": 6}),
    Case("emoji", 1, {"quantize": "int8-weight"}),
    Case("emoji", 1, {"quantize": "int8"}),
    Case("emoji", 2, {"quantize": "int8"}),
    Case("emoji", 1, {"quantize": "fp8-weight"}),
    Case("emoji", 1, {"compile": True}),
    Case("emoji", 1, {"dtype": "bfloat16"}),
)
AWAY = (
    Case("emoji", 1, {"offload": "model:to=disk"}),
    Case("emoji", 1, {"offload": "group:to=disk"}),
    Case("emoji", 2, {"offload": "group:to=disk"}),
    Case("emoji", 1, {"offload": "group:to=disk,level=leaf"}),
    Case("emoji", 1, {"offload": "sequential:to=disk"}),
    Case("emoji", 2, {"placement": "balanced", "max_memory": {"cpu": "30MB"}, "offload_folder": "."}),
    Case("emoji", 2, {"offload": "group:to=disk", "text_encoders": "one-rank:kept=2"}),
    Case("tiny:sdxl", 1, {"offload": "model:to=disk"}),
    Case("tiny:hunyuanvideo", 2, {"offload": "group:to=disk"}),
)
"""Where a folder is asked for it is a temporary one."""
CASES = (*ALONE, *EXTRAS, *SHARED, *AWAY)
