"""What a rank makes of a call, in this process: pictures that come with it, videos, phases, seeds, previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import parafuse
from parafuse.errors import ConfigError, MemoryLimitError, UnsupportedError
from parafuse.launch.serve import painting
from parafuse.launch.serve.beats import Progress
from parafuse.launch.serve.feed import Handed
from parafuse.launch.serve.messages import Failed, FromRank, Item, Paint, Painted, Stepped
from parafuse.launch.serve.painting import Painter, kind_of, message_of, read_pictures, seeds_of, shown_at
from parafuse.launch.serve.phases import Phases
from tests import pipelines

STEPS: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 64}


class Told:
    """What is said to a supervisor."""

    def __init__(self) -> None:
        self.messages: list[FromRank] = []
        self.stop = ""

    def send(self, message: FromRank) -> None:
        self.messages.append(message)

    def stop_of(self, call: str) -> str:
        return self.stop

    @property
    def answer(self) -> Any:
        return self.messages[-1]


def painter(engine: parafuse.Engine, progress: Progress | None = None) -> tuple[Painter, Any]:
    told: Any = Told()
    made = Painter(engine, 0, told, progress or Progress(0), defaults={}, loras=None, max_loras=1)
    return made, told


def noise(path: Path, seed: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_pictures_that_come_with_a_call(tmp_path: Path) -> None:
    base = parafuse.Engine.from_pretrained("emoji").pipeline
    engine = parafuse.Engine.from_pipeline(diffusers.FluxImg2ImgPipeline(**base.components), alone=True)
    made, told = painter(engine)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    found = list[np.ndarray]()
    for seed in (1, 2):
        name = noise(inputs / f"{seed}.png", seed, "RGBA").name
        folder = tmp_path / str(seed)
        folder.mkdir()
        call = Paint(
            call="c", items=(Item(job="j", prompt="a red apple", seed=7),), settings=STEPS | {"strength": 0.5},
            images={"image": (name,)}, folder=str(folder),
        )  # fmt: skip
        made.paint(Handed(paint=call, pictures=read_pictures(call, inputs)))
        assert isinstance(told.answer, Painted), told.answer
        found.append(np.asarray(Image.open(folder / "0-0.png")).astype(int))
        plain = engine(
            "a red apple", image=Image.open(inputs / name).convert("RGB"), strength=0.5, seed=7, **STEPS
        ).images[0]
        assert np.array_equal(found[-1], np.asarray(plain))
    assert np.abs(found[0] - found[1]).max() > 1
    assert {one.num_steps for one in told.messages if isinstance(one, Stepped)} == {2}  # half of them, by strength
    two = Paint(call="c", items=call.items * 2, settings=call.settings, images=call.images)
    made.paint(Handed(paint=two, pictures=read_pictures(two, inputs)))
    assert isinstance(told.answer, Failed)
    assert (told.answer.kind, "for one job" in told.answer.message) == ("invalid", True)


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    noise(tmp_path / "secret.png", 1)
    (inputs / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", "link.png", str(tmp_path / "secret.png"), "none.png", ""):
        with pytest.raises(ConfigError, match="is not there"):
            read_pictures(Paint(call="c", items=(), images={"image": (name,)}), inputs)


def test_a_video_is_written_and_previewed(tmp_path: Path) -> None:
    engine = parafuse.Engine.from_pretrained(str(pipelines.wan(tmp_path / "wan")), alone=True)
    made, told = painter(engine)
    folder = tmp_path / "out"
    folder.mkdir()
    settings = {"num_inference_steps": 4, "width": 32, "height": 16, "num_frames": 5}
    call = Paint(
        call="c", items=(Item(job="j", prompt="a", seed=7),), settings=settings, folder=str(folder), format="mp4",
        frames_per_second=8, previews=1,
    )  # fmt: skip
    for _ in range(2):  # the second one has previews of what the first has shown
        made.paint(Handed(paint=call))
        assert isinstance(told.answer, Painted), told.answer
    assert told.answer.files == (("0-0.mp4",),)
    with av.open(str(folder / "0-0.mp4")) as found:
        assert len(list(found.decode(video=0))) == 5
    shown = [one.previews for one in told.messages if isinstance(one, Stepped)]
    assert [len(one) for one in shown] == [0, 0, 0, 0, 0, 1, 0, 0]


def test_phases_come_in_their_order() -> None:
    engine = parafuse.Engine.from_pretrained("emoji", alone=True)
    entered = list[str]()

    class Noting(Progress):
        def enter(self, phase: str) -> None:
            if entered[-1:] != [phase]:
                entered.append(phase)
            super().enter(phase)

    progress = Noting(0)
    phases = Phases(engine.pipeline, progress, prepares=True)
    made, told = painter(engine, progress)
    call = Paint(call="c", items=(Item(job="j", prompt="a red apple", seed=7),), settings=STEPS)
    moves = progress.moves
    made.paint(Handed(paint=call))
    assert entered == ["encoding", "compiling", "denoising", "decoding", "writing", "idle"]
    assert progress.moves > moves + 2 * STEPS["num_inference_steps"]
    made.paint(Handed(paint=call))
    assert entered[6:] == ["encoding", "denoising", "decoding", "writing", "idle"]  # nothing of this size is new
    assert isinstance(told.answer, Painted)
    progress.renewed += 1  # an adapter has come: its layers may be compiled anew
    made.paint(Handed(paint=call))
    assert entered[11:] == ["encoding", "compiling", "denoising", "decoding", "writing", "idle"]
    phases.close()
    assert "decode" not in vars(engine.pipeline.vae)
    entered.clear()
    engine("a red apple", seed=7, **STEPS)
    assert not entered


def test_seeds_of_a_call() -> None:
    items = (Item(job="a", prompt="", seed=5, num_outputs=2), Item(job="b", prompt="", seed=2**63 - 1, num_outputs=2))
    assert seeds_of(items) == [5, 6, 2**63 - 1, 0]


def test_previews_are_spread_over_the_steps() -> None:
    assert shown_at(0, 20) == frozenset()
    assert shown_at(1, 20) == {10}
    assert shown_at(3, 20) == {5, 10, 15}
    assert shown_at(9, 4) == {1, 2, 3}
    assert shown_at(2, 1) == frozenset()
    assert all(0 < step < n for previews in range(1, 30) for n in range(2, 40) for step in shown_at(previews, n))


def test_errors_by_kind() -> None:
    kinds = {
        ConfigError("width=63: no"): ("invalid", "width=63: no"),
        UnsupportedError("a\n b"): ("unsupported", "a b"),
        MemoryLimitError("too large"): ("memory", "too large"),
        torch.OutOfMemoryError("CUDA out of memory. 0x7f"): ("memory", "out of memory"),
        RuntimeError("/secret/path"): ("internal", "painting failed (RuntimeError)"),
    }
    for error, expected in kinds.items():
        assert (kind_of(error), message_of(error)) == expected


def test_a_fault_of_the_pipeline_is_told_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = parafuse.Engine.from_pretrained("emoji", alone=True)
    made, told = painter(engine)
    call = Paint(call="c", items=(Item(job="j", prompt="a red apple", seed=7),), settings=STEPS)
    with monkeypatch.context() as broken:

        def fails(*_: Any) -> None:
            raise RuntimeError("/secret/path")

        broken.setattr(painting.outputs, "paintings", fails)
        made.paint(Handed(paint=call))
    assert (told.answer.kind, told.answer.message) == ("internal", "painting failed (RuntimeError)")
    assert "/secret/path" in told.answer.details  # for the log
    told.stop = "no"
    made.paint(Handed(paint=call))
    assert told.answer.kind == "stopped"
    told.stop = ""
    made.paint(Handed(paint=call))
    assert isinstance(told.answer, Painted)
