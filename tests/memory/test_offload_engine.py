"""A pipeline whose weights are offloaded, and what its user calls: pictures, adapters, files and devices are those of a
pipeline with all weights in place."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import parafuse
from parafuse.engine.offload.component import OffloadedComponent
from parafuse.errors import ConfigError, MemoryLimitError, UnsupportedError
from parafuse.offload import offload_of
from parafuse.parallel import tiers
from parafuse.parallel.homes import DiskHome
from parafuse.parallel.residence import Residence, Turn
from tests import adapters
from tests.dist.ranks import close_pools, run_ranks
from tests.guided import flux, sdxl
from tests.options.cells import PIPELINES

EMOJI: dict[str, Any] = dict(num_inference_steps=3, width=64, height=64, output_type="np")
CALL: dict[str, Any] = flux.call(1) | {"num_inference_steps": 2}
LEVELS = ("model:to=disk", "group:to=disk", "group:level=leaf,to=disk", "sequential:to=disk")


def made() -> Any:
    return flux.build("FluxPipeline")


def engine(offload: str | None, **more: Any) -> parafuse.Engine:
    return parafuse.Engine.from_pipeline(made(), parafuse.Config(offload=offload, **more))


def plain_emoji() -> np.ndarray[Any, Any]:
    from tests.dist.test_emoji import MODEL

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(str(MODEL), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    more = dict(true_cfg_scale=2.0, negative_prompt="", max_sequence_length=16)
    return pipeline("a cat", generator=torch.Generator().manual_seed(5), **EMOJI, **more).images


@pytest.mark.parametrize("offload", LEVELS)
def test_the_picture_is_that_of_plain_diffusers(offload: str) -> None:
    want = plain_emoji()
    with parafuse.Engine.from_pretrained("emoji", parafuse.Config(offload=offload)) as one:
        for _ in range(2):
            assert np.array_equal(one("a cat", seed=5, **EMOJI).images, want)
        moved = one.receipt["offload"]
        assert moved["moved_bytes"] > 0
        whole = sum(p.nbytes for name in ("transformer",) for p in getattr(one.pipeline, name).parameters())
        assert moved["most_resident_bytes"] < whole * (1.01 if offload.startswith("model") else 0.5)
        names = ("transformer", "vae", "text_encoder", "text_encoder_2")
        assert all(any(f" on {name}: " in line for line in one.receipt["applied"]) for name in names)


COMBINED: list[dict[str, Any]] = [
    dict(offload="group:to=disk", compile=True),
    dict(offload="group:to=disk", quantize="int8:min_features=8", compile=True),
    dict(offload="group:to=disk,prefetch=2", quantize="fp8:reference=true,min_features=16"),
    dict(offload="group:to=disk", cache="first-block:0.2"),
    dict(offload="group:to=disk", rewrites="modulation"),
    dict(offload="model:to=disk", rewrites="modulation"),
    dict(offload="group:level=leaf,to=disk", rewrites="modulation"),
    dict(offload="group:to=disk", rewrites="qkv"),
    dict(offload="group:to=disk", rewrites="qkv", compile=True),
    dict(offload="group:to=disk", rewrites="modulation,rope", compile=True),
]


OTHERWISE = ("offload", "rewrite rope")
"""Lines that may differ; the second says whether torch had the graphs already."""


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("asked", COMBINED, ids=lambda asked: " ".join(map(str, asked.values())))
def test_beside_other_options(asked: dict[str, Any]) -> None:
    values = CALL | {"num_inference_steps": 4, "seed": 1}
    backend = (
        "inductor" if "rope" in asked.get("rewrites", "") else "aot_eager"
    )  # its pass is inductor's; it takes long

    def found(**asked: Any) -> tuple[Tensor, list[str]]:
        torch.compiler.reset()
        with mock.patch.object(tiers, "BACKEND", backend), engine(**asked) as one:
            images = one(**values).images
            assert torch.equal(one(**values).images, images)
            return images, one.receipt["applied"]

    want, said = found(**asked | {"offload": None})
    got, says = found(**asked)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert [x for x in says if not x.startswith(OTHERWISE)] == [x for x in said if not x.startswith(OTHERWISE)]


@pytest.mark.parametrize("offload", ["group:to=disk", "sequential:to=disk"])
def test_a_rewrite_that_tries_calls(offload: str) -> None:
    """Padded prompts of a video model, cut."""
    build, call, _ = PIPELINES["HunyuanVideo"]

    def found(offload: str | None) -> tuple[Tensor, list[str]]:
        with parafuse.Engine.from_pipeline(build(), parafuse.Config(offload=offload, rewrites="text")) as one:
            return one(**call(2) | {"num_inference_steps": 3}, seed=[1, 2]).frames, one.receipt["applied"]

    want, said = found(None)
    got, says = found(offload)
    assert any("calls cut" in line for line in said)
    assert [line for line in says if not line.startswith("offload")] == said
    assert torch.equal(got, want)


def test_a_unet_and_its_encoders() -> None:
    def found(offload: str | None) -> Tensor:
        pipeline = sdxl.build()
        with parafuse.Engine.from_pipeline(pipeline, parafuse.Config(offload=offload)) as one:
            return one(**sdxl.call_text(2) | {"num_inference_steps": 2}, seed=[1, 2]).images

    want = found(None)
    for offload in LEVELS:
        assert torch.equal(found(offload), want)


# what a user calls


def story(one: parafuse.Engine, folder: Path) -> list[tuple[str, Tensor]]:
    """Pictures and weights after each change."""
    found: list[tuple[str, Tensor]] = []

    def picture(name: str) -> None:
        found.append((name, one(**CALL, seed=1).images.clone()))

    picture("first")
    one.load_lora_weights(adapters.lora(one.pipeline, ("transformer",), rank=3, seed=1, every=2), adapter_name="a")
    picture("adapter")
    one.set_adapters("a", 0.4)
    picture("scaled")
    one.fuse_lora()
    picture("fused")
    one.unfuse_lora()
    picture("unfused")
    one.fuse_lora()
    one.unload_lora_weights()
    picture("fused, unloaded")
    one.save(folder)
    with parafuse.Engine.from_pretrained(str(folder), parafuse.Config(dtype="float32")) as saved:
        found.append(("saved", saved(**CALL, seed=1).images))
    found += sorted(one.transformer.state_dict().items())
    one.transformer = made().transformer
    picture("replaced")
    one.text_encoder = made().text_encoder
    picture("encoder replaced")
    other = one.from_pipe(diffusers.FluxPipeline)
    found.append(("another", other(**CALL, seed=1).images.clone()))
    one.to(torch.bfloat16)
    picture("bfloat16")
    one.to(torch.float32)
    picture("float32")
    one.maybe_free_model_hooks()
    one.remove_all_hooks()
    one.reset_device_map()
    picture("hooks removed")
    return found


@pytest.mark.parametrize("offload", LEVELS)
def test_changes_are_those_of_a_pipeline_in_place(offload: str, tmp_path: Path) -> None:
    with engine(None) as one:
        want = story(one, tmp_path / "plain")
    with engine(offload) as one:
        got = story(one, tmp_path / "offloaded")
        weights = list(one.pipeline.transformer.parameters())
        assert all(bool(p.isnan().all()) for p in weights)
    assert not any(bool(p.isnan().any()) for p in weights)
    for (name, a), (other, b) in zip(want, got, strict=True):
        assert (name, True) == (other, torch.equal(a, b))


def test_adapters_that_come_and_go_leave_no_files_in_a_named_folder(tmp_path: Path) -> None:
    with engine(f"group:to=disk,folder={tmp_path}") as one:
        want, first = one(**CALL, seed=1).images, {file.name for file in tmp_path.glob("*.weights")}
        for seed in range(3):
            weights = adapters.lora(one.pipeline, ("transformer",), rank=3, seed=seed, every=2)
            one.load_lora_weights(weights, adapter_name=f"a{seed}")
            one.fuse_lora()
            assert len(list(tmp_path.glob("*.weights"))) == len(first) + 1
            one.unfuse_lora()
            one.unload_lora_weights()
        assert len(list(tmp_path.glob("*.weights"))) <= len(first) + 1  # unfused weights are not the same to the bit
        assert (one(**CALL, seed=1).images - want).abs().max() < 1e-3
    assert {file.name for file in tmp_path.glob("*.weights")} == first


def formats_seen(pipeline: Any, call: dict[str, Any]) -> tuple[set[bool], Tensor]:
    """Whether weights of convolutions are channels-last where they are computed with, and the picture."""
    seen: set[bool] = set()
    real = torch.nn.Conv2d._conv_forward

    def convolved(self: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        if min(weight.shape[1:]) > 1:
            seen.add(weight.is_contiguous(memory_format=torch.channels_last))
        return real(self, x, weight, bias)

    with mock.patch.object(torch.nn.Conv2d, "_conv_forward", convolved):
        return seen, pipeline(**call, generator=torch.Generator().manual_seed(1)).images


@pytest.mark.parametrize("offload", ["group:to=disk", "sequential:to=disk"])
def test_another_memory_format_is_what_comes(offload: str) -> None:
    call = sdxl.call_text(1) | {"num_inference_steps": 2, "output_type": "pt"}
    call.pop("seed", None)
    plain, own = sdxl.build(), sdxl.build()
    for one in (plain, own):
        one.set_progress_bar_config(disable=True)
    for part in (plain.unet, plain.vae):
        part.to(memory_format=torch.channels_last)
    seen, want = formats_seen(plain, call)
    assert seen == {True}
    with parafuse.apply(own, parafuse.Config(offload=offload)):
        assert own.unet.to("cpu", memory_format=torch.channels_last) is own.unet
        own.vae.to(memory_format=torch.channels_last)
        seen, got = formats_seen(own, call)
        assert seen == {True}
        assert (got - want).abs().max() <= 1e-5
    assert own.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_another_device_is_refused_by_its_number_too() -> None:
    method = offload_of("group")
    assert method is not None
    model = torch.nn.Linear(2, 2)
    one = OffloadedComponent("unet", model, method, mock.Mock(device=torch.device("cuda", 0)))
    original = mock.Mock()
    to, cuda = one._instead("to", original), one._instead("cuda", original)
    for asked in ("cuda:1", 1, torch.device("cuda", 1), "cpu"):
        with pytest.raises(ConfigError, match="its weights come to 'cuda:0' by themselves"):
            to(asked)
        with pytest.raises(ConfigError, match="its weights come to 'cuda:0' by themselves"):
            to(device=asked, dtype=torch.float16)
        with pytest.raises(ConfigError, match="its weights come to 'cuda:0' by themselves"):
            cuda(asked)
    with pytest.raises(ConfigError, match="its weights come to 'cuda:0' by themselves"):
        cuda(device=1)
    for asked in ("cuda:0", 0, torch.device("cuda")):
        assert to(asked) is cuda(asked) is to(device=asked) is model
    assert cuda() is model
    original.assert_not_called()
    to("cuda", torch.float16, memory_format=torch.channels_last)
    original.assert_called_once_with(dtype=torch.float16, memory_format=torch.channels_last)


def test_methods_that_meet_placeholders_fail_without_going_home(tmp_path: Path) -> None:
    """The comparison would see it: fused into what stands for weights, or saved from that."""
    with engine("group:to=disk") as one:
        lora = adapters.lora(one.pipeline, ("transformer",), rank=3, seed=1, every=2)
        with mock.patch.object(Residence, "at_home", return_value=mock.MagicMock()):
            state = one.transformer.state_dict()
            assert all(bool(x.isnan().all()) for x in state.values())
        one.load_lora_weights(lora, adapter_name="a")
        with (
            mock.patch.object(Turn, "at_home", return_value=mock.MagicMock()),
            mock.patch.object(Residence, "at_home", return_value=mock.MagicMock()),
            pytest.raises(RuntimeError, match="more than one element of the written-to tensor"),
        ):
            one.fuse_lora()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda one: one.enable_model_cpu_offload(device="cpu"), "keeps the weights elsewhere already"),
        (lambda one: one.enable_sequential_cpu_offload(device="cpu"), "keeps the weights elsewhere already"),
        (lambda one: one.enable_group_offload(onload_device=torch.device("cpu")), "keeps the weights elsewhere"),
        (lambda one: one.transformer.enable_group_offload(torch.device("cpu")), "keeps the weights elsewhere"),
        (lambda one: one.transformer.enable_layerwise_casting(torch.float8_e4m3fn), "casts weights before and after"),
        (lambda one: one.transformer.to("meta"), "come to 'cpu' by themselves"),
        (lambda one: one.vae.cuda(), "is offloaded"),
    ],
)
def test_what_cannot_be_beside_it_is_said_and_the_engine_goes_on(call: Any, words: str) -> None:
    with engine("group:to=disk") as one:
        want = one(**CALL, seed=1).images
        with pytest.raises(ConfigError, match=words):
            call(one)
        assert torch.equal(one(**CALL, seed=1).images, want)


def test_a_pipeline_of_the_user_goes_home_after_each_call() -> None:
    pipeline = made()
    values = CALL | {"generator": torch.Generator().manual_seed(1)}
    want = pipeline(**values).images
    with parafuse.apply(pipeline, parafuse.Config(offload="model:to=disk")) as handle:
        with pytest.raises(ConfigError, match="keeps the weights elsewhere already"):
            pipeline.enable_model_cpu_offload(device="cpu")
        got = pipeline(**values | {"generator": torch.Generator().manual_seed(1)}).images
        assert torch.equal(got, want)
        assert handle.offloading is not None
        assert handle.offloading.ledger.resident_bytes == 0
        assert pipeline.device == torch.device("cpu")
        assert pipeline.dtype == torch.float32
    again = pipeline(**values | {"generator": torch.Generator().manual_seed(1)}).images
    assert torch.equal(again, want)


def test_a_pipeline_that_another_library_offloads_is_refused() -> None:
    pipeline = made()
    pipeline.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ConfigError, match="is offloaded or placed by accelerate; take that off before"):
        parafuse.apply(pipeline, parafuse.Config(offload="model:to=disk"))
    pipeline.remove_all_hooks()
    pipeline.text_encoder_2.to("meta")
    with pytest.raises(UnsupportedError, match="on the meta device, without values"):
        parafuse.apply(pipeline, parafuse.Config(offload="model:to=disk"))
    assert not any(bool(p.isnan().any()) for p in pipeline.transformer.parameters())


def test_parts_that_are_called_by_themselves_have_their_weights() -> None:
    pipeline = made()
    latents = torch.randn(1, 1, 4, 4)
    latents = torch.randn(1, pipeline.vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        want = pipeline.vae.decode(latents).sample
        ids = torch.arange(7)[None]
        words = pipeline.text_encoder_2.encoder(ids)[0]
        embedded = pipeline.text_encoder_2.shared(ids)
        for offload in LEVELS:
            with parafuse.apply(pipeline, parafuse.Config(offload=offload)):
                assert torch.equal(pipeline.vae.decode(latents).sample, want)
                assert torch.equal(pipeline.text_encoder_2.encoder(ids)[0], words)
                assert torch.equal(pipeline.text_encoder_2.shared(ids), embedded)


# ranks


def two_that_share(*names: str) -> tuple[Any, Any, list[Tensor]]:
    """Pipelines that have some components in common, and what each paints in place."""
    first, second = made(), made()
    second = diffusers.FluxPipeline(**(dict(second.components) | {name: getattr(first, name) for name in names}))
    return first, second, [by_hand(one) for one in (first, second)]


def by_hand(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {key: value for key, value in CALL.items() if key != "seed"} | {"output_type": "pt"}
    return pipeline(**call, generator=torch.Generator().manual_seed(1)).images


@pytest.mark.parametrize("names", [("vae",), ("vae", "text_encoder_2", "tokenizer_2")], ids=lambda names: names[-1])
@pytest.mark.parametrize("offload", ["model:to=disk", "group:to=disk"])
def test_two_pipelines_that_share_components(offload: str, names: tuple[str, ...]) -> None:
    first, second, want = two_that_share(*names)
    handles = [parafuse.apply(one, parafuse.Config(offload=offload)) for one in (first, second)]
    for one, image in ((second, want[1]), (first, want[0]), (second, want[1])):
        assert torch.equal(by_hand(one), image)
    handles[0].remove()
    assert torch.equal(by_hand(second), want[1])
    handles[1].remove()
    assert [torch.equal(by_hand(one), image) for one, image in zip((first, second), want, strict=True)] == [True, True]
    assert "to" not in vars(first.vae)


def test_components_that_another_way_offloads_are_refused() -> None:
    first, second, want = two_that_share("vae")
    handle = parafuse.apply(first, parafuse.Config(offload="model:to=disk"))
    with pytest.raises(ConfigError, match="belong to others too, which have 'model:to=disk,device=cpu'"):
        parafuse.apply(second, parafuse.Config(offload="group:to=disk"))
    assert torch.equal(by_hand(first), want[0])
    handle.remove()
    assert torch.equal(by_hand(second), want[1])


def on_ranks(offload: str, **layout: int) -> list[Any]:
    """Pictures of an engine on these ranks."""
    config = parafuse.Config(parallel=parafuse.Parallel(**layout), offload=offload)
    with parafuse.Engine.from_pretrained("emoji", config) as one:
        images = one("a cat", seed=5, **EMOJI).images
        return [images, one.receipt["offload"], sorted(_mapped())]


def _mapped() -> set[str]:
    """Files of weights that this process has open now, in the folder that all tests share."""
    from parafuse.parallel.homes import ENDING, temporary_folder

    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return {str(path) for path in links if path.parent == temporary_folder() and path.name.endswith(ENDING)}


def split_in_two(offload: str) -> list[Any]:
    return on_ranks(offload, ulysses=2)


def split_in_branches(offload: str) -> list[Any]:
    return on_ranks(offload, cfg=2, ring=2, ulysses=1)


@pytest.mark.parametrize(
    ("run", "size", "offload"),
    [(split_in_two, 2, "group:to=disk"), (split_in_two, 2, "sequential:to=disk"), (split_in_branches, 4, LEVELS[0])],
)
def test_ranks_give_the_picture_and_share_the_files(run: Any, size: int, offload: str) -> None:
    want = plain_emoji()
    found = run_ranks(run, size, offload, timeout_s=300)
    for images, moved, _ in found:
        assert float(np.abs(images - want).max()) <= 1 / 255
        assert moved["moved_bytes"] > 0
    used = {name for _, _, files in found for name in files}
    assert len(used) == 4  # one for each component, not for each rank
    assert not any(Path(name).exists() for name in used)


@pytest.mark.whole
def test_ranks_that_an_engine_starts() -> None:
    want = plain_emoji()
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2), offload="group:to=disk")
    with parafuse.Engine.from_pretrained("emoji", config) as one:
        assert float(np.abs(one("a cat", seed=5, **EMOJI).images - want).max()) <= 1 / 255
        with pytest.raises(ConfigError, match="keeps the weights elsewhere already"):
            one.transformer.enable_group_offload(torch.device("cpu"))
        assert float(np.abs(one("a cat", seed=5, **EMOJI).images - want).max()) <= 1 / 255


def test_a_placement_is_taken_off_on_all_ranks(tmp_path: Path) -> None:
    config = parafuse.Config(
        parallel=parafuse.Parallel(ulysses=2), placement={"": "cpu", "transformer": "disk"}, timeout_s=60,
        offload_folder=str(tmp_path), device="cpu",
    )  # fmt: skip
    with parafuse.Engine.from_pretrained("emoji", config) as one:
        one.reset_device_map()
        other = one.from_pipe(diffusers.FluxImg2ImgPipeline)  # each rank takes its own plan
        image = Image.new("RGB", (32, 32))
        other("a cat", image=image, strength=1.0, seed=1, num_inference_steps=2, width=32, height=32)
        assert other.receipt["plan"]["placement"] is None


def pictures_on_replicas(offload: str | None) -> list[np.ndarray[Any, Any]]:
    """Two prompts, decoded on two ranks, twice."""
    config = parafuse.Config(parallel=parafuse.Parallel(data=2, ulysses=1), offload=offload)
    with parafuse.Engine.from_pretrained("emoji", config) as one:
        return [one(["a cat", "the apple"], seed=[5, 6], **EMOJI).images for _ in range(2)]


def test_replicas_decode_their_own() -> None:
    want = run_ranks(pictures_on_replicas, 2, None, timeout_s=300)[0]
    for offload in ("group:to=disk", "model:to=disk"):
        for found in run_ranks(pictures_on_replicas, 2, offload, timeout_s=300):
            assert all(map(np.array_equal, found, want))


def with_a_disk_that_fails() -> tuple[str, str]:
    """What both ranks say, and what they paint, when one of them cannot read its weights."""
    import torch.distributed as dist

    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2), offload="group:to=disk", timeout_s=20)
    with parafuse.Engine.from_pretrained("emoji", config) as one:
        one("a cat", seed=5, **EMOJI)
        broken = mock.patch.object(DiskHome, "read", side_effect=MemoryLimitError("the disk is gone"))
        try:
            with broken if dist.get_rank() == 1 else nullcontext():
                one("a cat", seed=5, **EMOJI)
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


def test_a_rank_whose_disk_fails_fails_the_request_on_all() -> None:
    found = run_ranks(with_a_disk_that_fails, 2, timeout_s=300)
    close_pools()  # rank 0 has left an exchange behind, which closes the connection when its time is over
    assert found[1] == ("MemoryLimitError", "the disk is gone")
    assert found[0][0] == "RankError"
