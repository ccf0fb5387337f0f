"""docs/drop-in.md knows every public member of the pipelines that diffusers has now, and the scripts are its source."""

from __future__ import annotations

import pytest

from parafuse.engine.members import HERE, OTHER_WAYS, PARTS, WRITES
from tests.drop_in.pipelines import CLASSES, members
from tests.drop_in.rows import AS_DIFFUSERS, REFUSED, SCRIPTS, WORKS
from tests.drop_in.table import KEYWORDS, PAGE, between, keywords, states


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_has_a_script(name: str) -> None:
    """A member of a newer diffusers is untested until it gets one."""
    assert sorted(SCRIPTS[name]()) == members(name)


def test_every_member_is_in_the_table() -> None:
    found = states(between(PAGE.read_text()))
    assert sorted(found) == sorted((name, member) for name in CLASSES for member in members(name))
    for (name, member), cells in found.items():
        script = SCRIPTS[name]()[member]
        for ranks, cell in zip((1, 2), cells, strict=True):
            want = REFUSED if ranks in script.refused else AS_DIFFUSERS if script.raises else WORKS
            assert cell == want, (name, member, ranks)


def test_the_keywords_of_loading_are_those_of_their_data() -> None:
    assert between(PAGE.read_text(), *KEYWORDS) == keywords()


def test_names_that_are_placed_are_names_that_there_are() -> None:
    """A name that diffusers drops, or a slip of the pen, would be placed for nothing."""
    import diffusers
    from torch import nn

    classes = [getattr(diffusers, name) for name in CLASSES]
    classes += [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionUpscalePipeline, diffusers.ModelMixin]
    there = {name for cls in (*classes, nn.Module) for name in dir(cls)}
    assert (HERE | WRITES | OTHER_WAYS.keys()) <= there
    assert not PARTS.keys() & set(dir(diffusers.FluxPipeline)), "these are methods of pipelines again"
