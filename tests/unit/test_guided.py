"""Which calls have guidance branches, as far as arguments tell, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from parafuse.engine.guided import check_guided
from parafuse.errors import ConfigError


class ByProperty:
    """As most pipelines: a property that looks at what the call has set, and at the model."""

    distilled = False

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and not self.distilled  # type: ignore[attr-defined]

    def __call__(self, prompt: str, guidance_scale: float = 5.0) -> None: ...


class Distilled(ByProperty):
    distilled = True


class TrueScale:
    """As FLUX: guidance_scale is an input of the model, true_cfg_scale is guidance."""

    def __call__(
        self, guidance_scale: float = 3.5, true_cfg_scale: float = 1.0, negative_prompt: Any = None,
        negative_prompt_embeds: Any = None,
    ) -> None: ...  # fmt: skip


class Embedded:
    transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=True))

    def __call__(self, guidance_scale: float = 3.5) -> None: ...


class Plain:
    def __call__(self, guidance_scale: float = 7.5) -> None: ...


class Unconditional:
    def __call__(self, num_inference_steps: int = 50) -> None: ...


class WithGuider:
    guider = object()

    def __call__(self, prompt: str = "") -> None: ...


@pytest.mark.parametrize(
    ("pipeline", "call"),
    [
        (ByProperty(), {}),
        (TrueScale(), {"true_cfg_scale": 4.0, "negative_prompt": ""}),
        (TrueScale(), {"true_cfg_scale": 4.0, "negative_prompt_embeds": object()}),
        (Plain(), {}),
        (WithGuider(), {}),
    ],
)
def test_guided(pipeline: Any, call: dict[str, Any]) -> None:
    before = dict(vars(pipeline))
    check_guided(pipeline, call, 2)
    assert vars(pipeline) == before


@pytest.mark.parametrize(
    ("pipeline", "call", "why"),
    [
        (ByProperty(), {"guidance_scale": 1.0}, "guidance_scale=1.0"),
        (Distilled(), {}, "guidance_scale=5.0"),
        (TrueScale(), {"negative_prompt": "x"}, "true_cfg_scale=1.0: must be above 1"),
        (TrueScale(), {"true_cfg_scale": 4.0}, "no negative_prompt"),
        (Embedded(), {}, "the model was distilled"),
        (Plain(), {"guidance_scale": 0}, "guidance_scale=0: must be above 1"),
        (Unconditional(), {}, "it takes no guidance_scale"),
    ],
)
def test_not_guided(pipeline: Any, call: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_guided(pipeline, call, 2)
    text = str(caught.value)
    assert text.startswith(f"parallel.cfg=2: this call of {type(pipeline).__name__} has no guidance branches ({why}")
    assert "use cfg=1" in text


class Skipping:
    def __call__(self, guidance_scale: float = 7.5, skip_guidance_layers: Any = None) -> None: ...


def test_a_third_rank_needs_a_third_branch() -> None:
    check_guided(Skipping(), {"skip_guidance_layers": [1]}, 3)
    check_guided(WithGuider(), {}, 3)
    for pipeline in (Skipping(), ByProperty(), Plain()):
        with pytest.raises(ConfigError, match=r"parallel.cfg=3: this call of \w+ has 2 guidance branches"):
            check_guided(pipeline, {}, 3)
