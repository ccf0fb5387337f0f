"""The command line around an engine that is faked: what it passes on, where it writes, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from parafuse.config import Axis, Config
from parafuse.engine.plan import Plan
from parafuse.engine.planning import choose
from parafuse.errors import ConfigError, ModelError, RankError
from parafuse.launch import cli, quiet
from parafuse.parallel import ranks
from parafuse.parallel.ranks import RankFailure


def plan_for(world_size: int, model_id: str = "abc") -> Plan:
    degrees = {str(axis): 1 for axis in Axis} | {"ulysses": world_size}
    facts = {"device": "cpu", "dtype": "float32", "timeout_s": 600.0}
    return Plan(model="emoji", model_id=model_id, world_size=world_size, degrees=degrees, **facts)


@dataclass
class World:
    """What the fakes were asked."""

    folder: Path
    calls: list[tuple[str, int | None, dict[str, Any]]] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    started: list[dict[str, Any]] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    fault: Exception | None = None
    """Raised by the engine's call."""
    failure: RankFailure | None = None
    """Reported by the ranks that are started."""
    closed: int = 0
    plan: Plan = field(default_factory=lambda: plan_for(1))
    """Of the engine."""


class FakePipeline:
    def __call__(self, prompt: str) -> None:
        """Takes no output_type."""


class FakeVideoPipeline:
    def __call__(self, prompt: str, output_type: str = "np") -> None:
        """Gives arrays unless it is asked for pictures."""


class FakeEngine:
    pipeline: Any = FakePipeline()

    def __init__(self, world: World) -> None:
        self.world, self.plan, self.receipt, self.rank = world, world.plan, {}, int(os.environ.get("RANK", "0"))
        self.chosen = None

    def __call__(self, prompt: str, seed: int | None, **call: Any) -> Any:
        if self.world.fault:
            raise self.world.fault
        self.world.calls.append((prompt, seed, call))
        self.receipt = {"seed": 11 if seed is None else seed}
        names = ("num_images_per_prompt", "num_videos_per_prompt")
        return SimpleNamespace(images=["image"] * max(call.get(name, 1) for name in names))

    def close(self) -> None:
        self.world.closed += 1


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Fakes for the engine's modules, an empty current folder, and a process that is no rank."""
    state = World(tmp_path)

    def locate(model: str, *, allow_pickle: bool = False) -> Any:
        if model == "nothing":
            raise ModelError("model='nothing': no such folder.")
        classes = {"flux": "FluxPipeline", "ddpm": "DDPMPipeline", "wan": "WanPipeline"}
        facts = {"model_id": "abc", "defaults": state.defaults, "allow_pickle": allow_pickle}
        return SimpleNamespace(name=model, pipeline_class=classes.get(model), **facts)

    def check_call(_source: Any, call: dict[str, Any]) -> dict[str, Any]:
        if call.get("num_inference_steps") == 0:
            raise ConfigError("num_inference_steps=0: must be at least 1.")
        return call

    def from_pretrained(model: str, config: Config, **kwargs: Any) -> FakeEngine:
        state.engines.append({"model": model, "config": config, **kwargs})
        return FakeEngine(state)

    def save_image(_image: Any, path: Path, _receipt: Any) -> None:
        state.saved.append(str(path))

    def start(argv: list[str], **kwargs: Any) -> Any:
        state.started.append({"argv": argv, **kwargs})
        processes = SimpleNamespace(failure=state.failure)
        processes.wait = lambda: state.failure.parent_code if state.failure else 0
        processes.__enter__ = lambda: processes
        return Context(processes)

    fakes = {
        "source": {"locate": locate},
        "request": {"check_call": check_call},
        "planner": {"resolve": lambda config, _source, world_size, **_: config.parallel.degrees(world_size)},
        "engine": {"Engine": SimpleNamespace(from_pretrained=from_pretrained)},
        "receipt": {"save_image": save_image},
    }
    for name, content in fakes.items():
        module = ModuleType(f"parafuse.engine.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ranks, "start", start)
    monkeypatch.setattr(choose, "kept_facts", lambda *_: None)  # of a model that is none
    for name in ("silence_libraries", "hide_loading_bars", "silence_notes"):
        monkeypatch.setattr(quiet, name, lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return state


class Context:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> Any:
        return self.inner

    def __exit__(self, *_exc: object) -> None: ...


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*argv) -> (exit code, stdout, stderr)."""

    def call(*argv: str, supervised: bool = False) -> tuple[int, str, str]:
        code = cli.run(cli.Launch(argv, supervised))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_one_picture(world: World, run: Run) -> None:
    code, out, err = run(
        "generate", "a red apple", "--out", "apple.png", "--seed", "7", "--steps", "4", "--width", "64"
    )
    assert (code, err) == (0, "")
    assert world.calls == [("a red apple", 7, {"num_inference_steps": 4, "width": 64})]
    assert world.saved == ["apple.png"]
    assert out.startswith("apple.png  (")
    assert out.count("\n") == 1
    agreed = {"prompts": ["a red apple"], "seed": 7, "num_inference_steps": 4, "width": 64}
    wanted = {"model": "emoji", "config": Config(), "plan": None, "progress": True, "agree_on": agreed}
    wanted["expect"] = {"num_inference_steps": 4, "width": 64}
    assert world.engines == [wanted]
    assert world.closed == 1


def test_pictures_are_asked_for_where_the_pipeline_gives_arrays(
    world: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "pipeline", FakeVideoPipeline())
    assert run("generate", "x", "--out", "x.png", "--seed", "1")[0] == 0
    assert world.calls == [("x", 1, {"output_type": "pil"})]


def test_several_prompts_and_pictures_are_numbered(world: World, run: Run) -> None:
    code, out, _ = run("generate", "a", "b", "--num-images", "2", "--out", "x.png")
    assert code == 0
    assert world.saved == ["x-0.png", "x-1.png", "x-2.png", "x-3.png"]
    assert [prompt for prompt, _, _ in world.calls] == ["a", "b"]
    assert out.splitlines()[1].startswith("x-2.png, x-3.png  (")
    assert "seed 11" in out, "a seed that was drawn is told"


@pytest.mark.parametrize(
    ("model", "arguments", "keyword"),
    [
        ("flux", "--num-images 2", "num_images_per_prompt"),
        ("flux", "--set num_images_per_prompt=2", "num_images_per_prompt"),
        ("wan", "--num-images 2", "num_videos_per_prompt"),
        ("wan", "--set num_videos_per_prompt=2", "num_videos_per_prompt"),
    ],
)
def test_two_pictures_are_written_however_they_are_asked_for(
    world: World, run: Run, model: str, arguments: str, keyword: str
) -> None:
    assert run("generate", "a", "--model", model, "--out", "x.png", *arguments.split())[0] == 0
    assert world.calls[0][2] == {keyword: 2}
    assert world.saved == ["x-0.png", "x-1.png"]


@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "ein Apfel 🍎 苹果 تفاحة", "--", "a\nb"])
def test_any_prompt(world: World, run: Run, prompt: str) -> None:
    code, _, _ = run("generate", "--", prompt)
    assert code == 0
    assert world.calls[0][0] == prompt


def test_guidance_is_the_keyword_that_the_model_reads(world: World, run: Run) -> None:
    run("generate", "a", "--guidance", "2.5")
    world.defaults["true_cfg_scale"] = 3.0
    run("generate", "a", "--guidance", "2.5")
    assert [call for _, _, call in world.calls] == [{"guidance_scale": 2.5}, {"true_cfg_scale": 2.5}]


def test_set_takes_json_or_words(world: World, run: Run) -> None:
    texts = ("max_sequence_length=64", "flag=true", "word=hi there", 'quoted="1"', "list=[1, 2]", "none=null", "e=a=b")
    code, _, _ = run("generate", "a", *(part for text in texts for part in ("--set", text)))
    assert code == 0
    values = {"max_sequence_length": 64, "flag": True, "word": "hi there", "quoted": "1", "list": [1, 2]}
    assert world.calls[0][2] == values | {"none": None, "e": "a=b"}


def test_configuration_from_file_and_options(world: World, run: Run) -> None:
    Path("c.json").write_text(json.dumps({"dtype": "bfloat16", "timeout_s": 5, "parallel": {"ring": 1}}))
    code, _, _ = run("generate", "a", "--config", "c.json", "--timeout", "9", "--allow-pickle")
    assert code == 0
    assert world.engines[0]["config"] == Config(dtype="bfloat16", timeout_s=9.0, allow_pickle=True)


def test_plan_is_saved_and_replayed(world: World, run: Run) -> None:
    assert run("generate", "a", "--save-plan", "p.json")[0] == 0
    assert Plan.load("p.json") == plan_for(1)
    assert run("generate", "a", "--plan", "p.json")[0] == 0
    assert world.engines[1]["plan"] == plan_for(1)


def test_ranks_are_started_with_the_same_arguments(world: World, run: Run) -> None:
    argv = ("generate", "a b", "--ranks", "2", "--out", "x.png")
    assert run(*argv)[0] == 0
    [started] = world.started
    assert started["argv"] == [sys.executable, "-m", "parafuse", *argv]
    assert (list(started["ranks"]), started["world_size"]) == ([0, 1], 2)
    assert world.engines == []


def test_a_plan_gives_the_number_of_ranks(world: World, run: Run) -> None:
    plan_for(3).save("p.json")
    assert run("generate", "a", "--plan", "p.json")[0] == 0
    assert world.started[0]["world_size"] == 3


def test_a_failed_rank_is_shown(world: World, run: Run) -> None:
    world.failure = RankFailure(rank=1, exit_code=-9, summary="rank 1 was killed.", details="line 1\nline 2")
    code, _, err = run("generate", "a", "--ranks", "2")
    assert code == 137
    assert err == "[rank 1] line 1\n[rank 1] line 2\nparafuse: error: rank 1 was killed.\n"


def test_under_torchrun_its_ranks_are_used(world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, _ = run("generate", "a", "--out", "folder-of-rank-0/x.png")
    assert (code, out) == (0, "")
    assert world.started == []
    assert len(world.calls) == 1
    assert world.saved == []


def test_the_plan_is_told_once(world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tells one that has a reason."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    world.plan = plan_for(2)
    assert run("generate", "a")[2] == "parafuse: 2 ranks: ulysses 2, float32 on cpu\n"
    world.plan = dataclasses.replace(world.plan, why="because")
    assert run("generate", "a")[2] == ""


BAD: list[tuple[str, str]] = [
    ("--steps 0", "--steps 0: must be at least 1."),
    ("--set num_inference_steps=0", "--set num_inference_steps=0: must be at least 1."),
    ("--steps 1.5", "--steps '1.5': must be a whole number"),
    ("--guidance high", "--guidance 'high': must be a number"),
    ("--stepz 3", "unknown option '--stepz'; did you mean '--steps'?"),
    ("--ranks 0", "--ranks 0: must be at least 1"),
    ("--num-images 0", "--num-images 0: must be at least 1"),
    ("--seed -1", "--seed -1: must be from 0"),
    (
        "--ranks 3 --ulysses 2",
        "makes 2 ranks, but there are 3. Start 2, or choose degrees whose product is 3, such as ulysses=3.",
    ),
    ("--ulysses many", "--ulysses 'many': must be a whole number or 'auto'"),
    ("--dtype int4", "dtype='int4': must be one of"),
    ("--timeout 0", "timeout_s=0.0: must be from 1"),
    ("--model nothing", "model='nothing': no such folder"),
    ("--config gone.json", "config='gone.json': does not exist"),
    ("--config deep.json", "unknown key 'ulises'; did you mean 'ulysses'?"),
    ("--config typo.json", "unknown key 'dtpye'; did you mean 'dtype'?"),
    ("--plan gone.json", "plan='gone.json': does not exist"),
    ("--plan other.json", "made for 'emoji', not for this model"),
    ("--plan two.json --ranks 3", "plan.world_size=2: there are 3 ranks."),
    ("--plan two.json --ring 2", "--ring and --plan 'two.json'"),
    ("--plan two.json --timeout 5", "--timeout and --plan 'two.json'"),
    ("--plan two.json --config good.json", "--config and --plan 'two.json'"),
    ("--set steps", "--set 'steps': must be KEY=VALUE"),
    ("--set a=1 --set a=2", "--set 'a=2': it is set twice"),
    ("--steps 3 --set num_inference_steps=2", "--steps sets it too"),
    ("--set generator=1", "use --seed"),
    ("--set output_type=pt", "parafuse.Engine from Python"),
    ("--model flux --set max_sequence_lenght=3", "has no 'max_sequence_lenght'; did you mean 'max_sequence_length'?"),
    ("--model ddpm", "the call of DDPMPipeline has no 'prompt'; it takes"),
    ("--out x.gif", "must end in .png (a video is written as one picture per frame, x-0000.png and so on)."),
    ("--out x.jpeg", "--out 'x.jpeg': the file name must end in .png."),
    ("--out x", "--out 'x': the file name must end in .png"),
    ("--out no/such/x.png", "the folder 'no/such' does not exist; create it first"),
    ("--out good.json/x.png", "the folder 'good.json' is a file; choose another"),
    ("--out folder.png", "--out 'folder.png': is a folder"),
    ("--out /proc/x.png", "--out '/proc/x.png': cannot be written"),
    ("--save-plan x.txt", "--save-plan 'x.txt': the file name must end in .json"),
    ("--out x.png --save-plan ./x.json", "--save-plan './x.json': the receipt of --out goes there"),
    ("--quiet --verbose", "exclude each other"),
    ("--out", "requires an argument"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(world: World, run: Run, arguments: str, message: str) -> None:
    Path("folder.png").mkdir()
    Path("good.json").write_text("{}")
    Path("deep.json").write_text('{"parallel": {"ulises": 2}}')
    Path("typo.json").write_text('{"dtpye": "float32"}')
    plan_for(2).save("two.json")
    plan_for(1, "another").save("other.json")
    code, out, err = run("generate", "a", *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("parafuse: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert world.engines == world.started == []


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ("RANK=0", (), "WORLD_SIZE: must be in the environment"),
        ("RANK=0 WORLD_SIZE=two", (), "WORLD_SIZE: must be in the environment, a whole number"),
        ("RANK=2 WORLD_SIZE=2", (), "rank 2: RANK=2: must be from 0 to WORLD_SIZE - 1 = 1"),
        ("RANK=0 WORLD_SIZE=2", ("--ranks", "4"), "--ranks 4: the launcher started 2"),
    ],
)
def test_bad_launcher_environment(world: World, run: Run, environment: str, arguments: Any, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for entry in environment.split():
            patch.setenv(*entry.split("="))
        code, _, err = run("generate", "a", *arguments)
    assert code == 2
    assert err.startswith("parafuse: error: ")
    assert message in err
    assert world.engines == []


def test_commands_and_nothing(run: Run) -> None:
    assert run("--version")[:2] == (0, "parafuse 0.1.0\n")
    code, _, err = run("genrate", "a")
    assert code == 2
    assert "did you mean 'generate'?" in err.lower()
    code, out, err = run()
    assert code == 2
    assert "generate" in out + err
    assert "error" not in err
    assert "prompt" in run("generate")[2].lower()


def test_errors_of_the_engine(world: World, run: Run) -> None:
    world.fault = RankError("rank 1 stalled.")
    assert run("generate", "a")[::2] == (1, "parafuse: error: rank 1 stalled.\n")
    world.fault = KeyError("surprise")
    code, _, err = run("generate", "a")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert world.closed == 0, "closing waits for the other ranks, who may wait in a collective"


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_in_a_rank_reach_its_launcher(
    world: World, run: Run, monkeypatch: pytest.MonkeyPatch, rank: str, supervised: bool
) -> None:
    error_file = world.folder / "error.json"
    for key, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(error_file)}.items():
        monkeypatch.setenv(key, value)
    world.fault = ConfigError("prompt: no.")
    monkeypatch.setattr("parafuse.launch.cli.FIRST_RANK_TELLS_S", 0.0)
    code, _, err = run("generate", "a", supervised=supervised)
    assert code == 2
    line = {"0": "parafuse: error: prompt: no.\n", "1": "parafuse: error: rank 1: prompt: no.\n"}[rank]
    assert err == ("" if supervised else line)
    recorded = json.loads(error_file.read_text())["message"]
    assert (recorded["message"], recorded["errorCode"]) == ("prompt: no.", 2)
    world.fault = KeyError("surprise")
    code, _, err = run("generate", "a", supervised=supervised)
    assert code == 1
    assert err.startswith("" if supervised else f"[rank {rank}] Traceback")
    assert bool(err) is not supervised
    assert "KeyError: 'surprise'" in json.loads(error_file.read_text())["message"]["extraInfo"]["py_callstack"]
