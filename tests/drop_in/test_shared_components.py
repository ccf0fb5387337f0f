"""Components that several pipelines have: made parallel once, for as long as one of them needs it."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import torch.distributed as dist
from diffusers.utils.torch_utils import TorchDeviceBackend
from torch import Tensor, nn

import parafuse
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, attempt
from tests.drop_in.test_modular import config, seeded
from tests.guided import modular, sdxl
from tests.models import error


def split() -> parafuse.Config:
    return config(cfg=dist.get_world_size())


def is_on(module: Any) -> bool:
    return "forward" in vars(module)


def two_pipelines() -> dict[str, Any]:
    """A pipeline and another one made from it, put on and taken off in both orders."""
    first = sdxl.build()
    second: Any = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"errors": [], "off": []}

    def pictures() -> list[Tensor]:
        return [
            first(**sdxl.call_text(1), **seeded()).images,
            second(**sdxl.call_image(1), **seeded()).images,
        ]

    def compare() -> None:
        found["errors"] += [error(x, y) for x, y in zip(pictures(), want, strict=True)]

    want = pictures()
    for order in (0, 1):
        handles = [parafuse.apply(first, split()), parafuse.apply(second, split())]
        compare()
        found["same"] = handles[0].guidance["unet"] is handles[1].guidance["unet"]
        found["lines"] = list(handles[1].applied)
        before = [sum(c.calls for c in handle.exchanged().values()) for handle in handles]
        handles[order].remove()
        found["still on"] = is_on(first.unet)
        compare()
        other = handles[1 - order]
        found["goes on"] = sum(c.calls for c in other.exchanged().values()) > before[1 - order]
        other.remove()
        found["off"].append(not is_on(first.unet) and "compile" not in vars(first.unet))
    with parafuse.apply(first, split()):
        found["other degrees"] = attempt(parafuse.apply, second, config(data=dist.get_world_size()))
    engine = parafuse.Engine.from_pipeline(first, split())
    other = engine.from_pipe(diffusers.StableDiffusionXLImg2ImgPipeline)
    third = parafuse.Engine.from_pipeline(second, split())
    found["errors"] += [error(one(**sdxl.call_image(1), **seeded()).images, want[1]) for one in (other, third)]
    engine.close()
    found["errors"].append(error(third(**sdxl.call_image(1), **seeded()).images, want[1]))
    third.close()
    found["off"].append(not is_on(first.unet))
    found["plain again"] = all(map(torch.equal, pictures(), want))
    return found


def test_two_pipelines_over_the_same_components() -> None:
    for found in run_ranks(two_pipelines, 2, timeout_s=120):
        assert max(found["errors"]) <= EXACT
        assert (found["same"], found["still on"], found["goes on"], found["plain again"]) == (True,) * 4
        assert found["lines"] == ["guidance parallel (cfg 2) on unet"]
        assert all(found["off"])
        assert "unet: runs with cfg=2 already; call remove()" in found["other degrees"]
        assert "data=2 is asked for" in found["other degrees"]


def over(manager: Any, components: dict[str, Any], collection: str) -> Any:
    """A modular pipeline whose components are in a manager."""
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    modular._hush(blocks)
    pipeline = blocks.init_pipeline(components_manager=manager, collection=collection)
    known = {name: part for name, part in components.items() if name in pipeline.components}
    pipeline.update_components(**known, guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
    return pipeline


def under_a_manager() -> dict[str, Any]:
    logging.disable(logging.ERROR)
    manager, found = diffusers.ComponentsManager(), dict[str, Any]()
    components, other = sdxl.build().components, sdxl.build().components["unet"]
    for parameter in other.parameters():
        parameter.mul_(0.9)
    first, second = (over(manager, components, name) for name in ("one", "two"))
    values = modular.call(1)

    def picture(pipeline: Any) -> Tensor:
        return pipeline(**values, **seeded())

    want = picture(first)
    handle = parafuse.apply(manager, split())
    found["on"] = sorted(handle.guidance)
    found["errors"] = [error(picture(one), want) for one in (first, second)]
    shared = parafuse.apply(second, split())
    first.update_components(unet=other)  # one collection has another UNet from now on
    found["after"] = sorted(handle.guidance)
    old, new = (handle.guidance[name].seen for name in ("unet", "unet 2"))
    before = old.total()
    plain = over(diffusers.ComponentsManager(), components | {"unet": _copy(other)}, "plain")
    found["errors"] += [error(picture(first), picture(plain)), error(picture(second), want)]
    found["both used"] = old.total() > before and new.total() > 0
    identity = next(name for name in manager.components if name.endswith(str(id(components["unet"]))))
    manager.remove(identity)  # the second pipeline has it still, and a handle of its own
    found["kept"] = is_on(components["unet"])
    shared.remove()
    found["freed"] = not is_on(components["unet"])
    added = manager.add("unet", _copy(other), collection="one")  # takes the place of the first one's
    found["added"] = is_on(manager.components[added])
    found["left"] = is_on(other)  # not of the manager any more
    handle.remove()
    modules = [part for part in manager.components.values() if isinstance(part, nn.Module)]
    found["off"] = not any(map(is_on, [*modules, other])) and not {"add", "remove"} & set(vars(manager))
    found["plain again"] = torch.equal(picture(second), want)
    logging.disable(logging.NOTSET)
    return found


def _copy(unet: Any) -> Any:
    made = type(unet).from_config(unet.config).eval().requires_grad_(False)
    made.load_state_dict(unet.state_dict())
    return made


def test_a_manager_and_its_collections() -> None:
    for found in run_ranks(under_a_manager, 2):
        assert max(found["errors"]) <= EXACT
        assert (found["on"], found["after"]) == (["unet"], ["unet", "unet 2"])
        assert (found["both used"], found["kept"], found["freed"], found["added"]) == (True,) * 4
        assert not found["left"]
        assert found["off"]
        assert found["plain again"]


def offloaded() -> dict[str, Any]:
    """Auto offload after parafuse, and before. The CPU says how much memory is free; plain diffusers asks a GPU."""
    logging.disable(logging.ERROR)
    manager, found = diffusers.ComponentsManager(), dict[str, Any]()
    pipeline, values = over(manager, sdxl.build().components, "one"), modular.call(1)
    want = pipeline(**values, **seeded())
    with patch.object(TorchDeviceBackend, "mem_get_info", lambda *_: (1 << 40, 1 << 40)):
        handle = parafuse.apply(manager, split())
        manager.enable_auto_cpu_offload(device="cpu")
        found["errors"] = [error(pipeline(**values, **seeded()), want)]
        found["hooked"] = hasattr(pipeline.unet, "_hf_hook")
        found["remove"] = attempt(handle.remove)
        replaced, new = pipeline.unet, _copy(pipeline.unet)
        pipeline.update_components(unet=new)
        found["errors"].append(error(pipeline(**values, **seeded()), want))
        found["new"] = (is_on(new), hasattr(new, "_hf_hook"))
        manager.disable_auto_cpu_offload()
        handle.remove()
        found["off"] = [getattr(one.forward, "parafuse", False) for one in (replaced, new)]
        manager.enable_auto_cpu_offload(device="cpu")
        found["before"] = attempt(parafuse.apply, manager, split())
        manager.disable_auto_cpu_offload()
    found["plain again"] = torch.equal(pipeline(**values, **seeded()), want)
    logging.disable(logging.NOTSET)
    return found


def test_auto_offload() -> None:
    for found in run_ranks(offloaded, 2):
        assert max(found["errors"]) <= EXACT
        assert found["hooked"]
        assert found["new"] == (True, True)
        assert "was replaced after parafuse was applied; take that off first" in found["remove"]
        assert "disable_auto_cpu_offload" in found["remove"]
        assert "unet: UNet2DConditionModel is offloaded or placed by accelerate" in found["before"]
        assert "disable_auto_cpu_offload" in found["before"]
        assert found["off"] == [False, False]
        assert found["plain again"]
