"""ComfyUI's nodes, found, checked and run the way ComfyUI does it, against a server.

ComfyUI is no package that could be installed here: `comfy` holds what its documentation promises to nodes."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from parafuse.launch.serve.jobs import JobError, State
from tests.serve.http.serving import Running, serving

FOLDER = Path(__file__).parents[3] / "integrations" / "comfyui"
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
SOCKETS = ("IMAGE", "MASK", "LATENT")


class InterruptProcessingException(Exception):
    """The user has pressed Cancel."""


class ProgressBar:
    """What is shown at a node."""

    shown: ClassVar[list[tuple[int, int, Any]]] = []

    def __init__(self, total: int):
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = self.total if total is None else total
        self.shown.append((value, self.total, preview))


class Comfy:
    """The part of ComfyUI that runs a node."""

    def __init__(self) -> None:
        self.interrupt_after: int | None = None
        self.looked = 0
        spec = importlib.util.spec_from_file_location("custom_nodes_parafuse", FOLDER / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        sys.modules["custom_nodes_parafuse"] = self.module
        spec.loader.exec_module(self.module)

    def look(self) -> None:
        self.looked += 1
        if self.interrupt_after is not None and self.looked > self.interrupt_after:
            raise InterruptProcessingException

    def run(self, kind: str, **inputs: Any) -> tuple[Any, ...]:
        """One node of a graph: what it is not given, but must be, has its widget's default."""
        node = self.module.NODE_CLASS_MAPPINGS[kind]
        types_of = node.INPUT_TYPES()
        known = types_of["required"] | types_of.get("optional", {})
        assert not inputs.keys() - known.keys()
        for name, (what, *options) in types_of["required"].items():
            if name not in inputs:
                assert what in WIDGETS, f"{name} must be connected"
                inputs[name] = options[0]["default"]
        results = getattr(node(), node.FUNCTION)(**inputs)
        assert len(results) == len(node.RETURN_TYPES)
        return results

    def run_graph(self, graph: dict[str, Any], others: dict[str, Callable[..., tuple[Any, ...]]]) -> None:
        """A graph in the form of ComfyUI's API; `others`: its own nodes."""
        made: dict[str, tuple[Any, ...]] = {}

        def value(given: Any) -> Any:
            return result(given[0])[given[1]] if isinstance(given, list) else given

        def result(name: str) -> tuple[Any, ...]:
            if name not in made:
                kind, inputs = graph[name]["class_type"], graph[name]["inputs"]
                found = {key: value(given) for key, given in inputs.items()}
                made[name] = others[kind](**found) if kind in others else self.run(kind, **found)
            return made[name]

        for name in graph:
            result(name)


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    for name in ("PARAFUSE_SERVER", "PARAFUSE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    found = Comfy()
    utils: Any = types.ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    management: Any = types.ModuleType("comfy.model_management")
    management.throw_exception_if_processing_interrupted = found.look
    for name, module in {
        "comfy": types.ModuleType("comfy"),
        utils.__name__: utils,
        management.__name__: management,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    ProgressBar.shown = []
    yield found
    for name in [name for name in sys.modules if name.startswith("custom_nodes_parafuse")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with serving(num_keys=0, loras=None) as running:
        yield running


@pytest.fixture
def server(shared: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    shared.behaviour.__init__()  # as new
    shared.behaviour.painted = []
    monkeypatch.setenv("PARAFUSE_SERVER", shared.base)
    yield shared
    shared.behaviour.hold = False


def test_nodes_are_declared_as_comfyui_asks(comfy: Comfy) -> None:
    names = comfy.module.NODE_CLASS_MAPPINGS
    assert names.keys() == comfy.module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in names.values():
        types_of = node.INPUT_TYPES()
        assert types_of.keys() <= {"required", "optional", "hidden"}
        assert callable(getattr(node, node.FUNCTION))
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert all(what in (*SOCKETS, "STRING") for what in node.RETURN_TYPES)
        assert isinstance(node.CATEGORY, str)
        for name, (what, *options) in (types_of["required"] | types_of["optional"]).items():
            assert name.isidentifier()
            assert what in SOCKETS or isinstance(options[0]["default"], WIDGETS[what]), name
            if options and "min" in options[0]:
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"], name
    json.dumps({name: node.INPUT_TYPES() for name, node in names.items()})  # as /object_info tells the browser


def test_a_prompt_becomes_pictures_with_progress_and_previews(comfy: Comfy, server: Running) -> None:
    images, receipt = comfy.run(
        "ParafuseGenerate", prompt="a red apple", seed=7, steps=5, width=64, height=32, guidance=3.0, batch_size=2,
        previews=2,
    )  # fmt: skip
    assert (images.shape, images.dtype) == ((2, 32, 64, 3), torch.float32)
    assert images[1, 0, 0].tolist() == pytest.approx([1 / 255, 0, 0])
    assert json.loads(receipt)["prompt"] == "a red apple"
    request = server.behaviour.painted[0].request
    assert (request.seed, request.num_outputs, request.previews) == (7, 2, 2)
    assert request.settings["num_inference_steps"] == 5
    steps = server.behaviour.steps
    assert [(value, total) for value, total, preview in ProgressBar.shown if preview is None][-1] == (steps, steps)
    previews = [preview for _, _, preview in ProgressBar.shown if preview is not None]
    assert len(previews) == 2
    assert all(kind == "JPEG" and isinstance(shown, Image.Image) for kind, shown, _ in previews)


def test_the_example_graph_runs(comfy: Comfy, server: Running) -> None:
    saved: list[torch.Tensor] = []
    graph = json.loads((FOLDER / "example.json").read_text())
    comfy.run_graph(graph, {"SaveImage": lambda images, filename_prefix: (saved.append(images),)})
    assert [one.shape[-1] for one in saved] == [3]


def test_what_is_left_at_its_default_is_left_to_the_model(comfy: Comfy, server: Running) -> None:
    comfy.run("ParafuseGenerate", prompt="x", seed=1)
    asked = server.behaviour.painted[0].request
    server.behaviour.painted.clear()
    with server.http(None) as http:
        http.post("/v1/images/generations", json={"prompt": "x", "seed": 1})
    assert asked.settings == server.behaviour.painted[0].request.settings


def test_cancel_ends_the_job_on_the_server(comfy: Comfy, server: Running) -> None:
    server.behaviour.hold = True
    comfy.interrupt_after = 5
    with pytest.raises(InterruptProcessingException):
        comfy.run("ParafuseGenerate", prompt="x")
    assert server.wait(server.behaviour.painted[0].id, State.CANCELLED)


def test_errors_are_one_line_that_says_what_to_do(comfy: Comfy, server: Running) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"width": 64}, "give both"),
        ({"width": 66, "height": 64}, "size: "),
        ({"lora": "a:b"}, "NAME:SCALE"),
        ({"lora": "missing:0.5"}, "there is no LoRA 'missing'"),
        ({"negative_prompt": "y" * 5000}, "at most 4000"),
        ({"server": "ftp://x"}, "must be an address"),
        ({"server": "http://127.0.0.1:9"}, "no parafuse server answers at http://127.0.0.1:9"),
    ]
    for fields, said in wrong:
        with pytest.raises(RuntimeError, match=said) as found:
            comfy.run("ParafuseGenerate", **{"prompt": "x"} | fields)
        assert "\n" not in str(found.value)
    server.behaviour.fail = JobError(kind="memory", message="out of memory; ask for less.")
    with pytest.raises(RuntimeError, match="out of memory; ask for less"):
        comfy.run("ParafuseGenerate", prompt="x")
    with pytest.raises(RuntimeError, match="takes no pictures"):
        comfy.run("ParafuseEdit", prompt="x", images=torch.zeros(1, 16, 16, 3))


def test_the_key_goes_to_its_own_server_alone(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, serving() as other:
        monkeypatch.setenv("PARAFUSE_SERVER", server.base)
        with pytest.raises(RuntimeError, match="PARAFUSE_API_KEY"):
            comfy.run("ParafuseGenerate", prompt="x")
        monkeypatch.setenv("PARAFUSE_API_KEY", server.secrets[0])
        assert comfy.run("ParafuseGenerate", prompt="x", server=f"{server.base}/")[0].shape[0] == 1
        sent: list[Any] = []
        client = sys.modules["custom_nodes_parafuse.client"]
        monkeypatch.setattr(
            client.requests.Session, "send", lambda _, request, **__: sent.append(request.headers) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            comfy.run("ParafuseGenerate", prompt="x", server=other.base)
    assert len(sent) == 1
    assert "authorization" not in sent[0]


def test_pictures_and_a_mask_are_sent(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with serving("tiny:qwen-image-edit", num_keys=0) as server:
        monkeypatch.setenv("PARAFUSE_SERVER", server.base)
        images, _ = comfy.run("ParafuseEdit", prompt="a hat", images=pictures, seed=3, batch_size=2, lora="")
        assert images.shape[0] == 2
        request = server.behaviour.painted[0].request
        assert (request.kind, request.seed, request.num_outputs) == ("edit", 3, 2)
        kept = [server.settings.inputs / name for name in request.images["image"]]
        for file, picture in zip(kept, pictures, strict=True):
            with Image.open(io.BytesIO(file.read_bytes())) as found:
                assert np.array_equal(np.asarray(found), (picture * 255).round().to(torch.uint8).numpy())
        with pytest.raises(RuntimeError, match=r"mask: the model .* takes none"):
            comfy.run("ParafuseEdit", prompt="a hat", images=pictures[:1], mask=torch.ones(1, 64, 64))
        with pytest.raises(RuntimeError, match="mask: has 2 pictures"):
            comfy.run("ParafuseEdit", prompt="a hat", images=pictures[:1], mask=torch.ones(2, 64, 64))


def test_a_server_that_comes_back_is_waited_for(comfy: Comfy, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client = sys.modules["custom_nodes_parafuse.client"]
    ask, broken = client.Server._ask, list[str]()

    def breaks(self: Any, method: str, path: str, **more: Any) -> Any:
        if path.endswith("/events") and len(broken) < 3:
            broken.append(path)
            raise client.UnreachableError("gone") if len(broken) < 3 else client.requests.ConnectionError("cut off")
        return ask(self, method, path, **more)

    monkeypatch.setattr(client.Server, "_ask", breaks)
    monkeypatch.setattr(client, "AGAIN_S", 0.01)
    assert comfy.run("ParafuseGenerate", prompt="x")[0].shape[0] == 1
    assert len(broken) == 3
    broken.clear()
    monkeypatch.setattr(client, "BACK_S", 0.0)
    with pytest.raises(RuntimeError, match="gone"):
        comfy.run("ParafuseGenerate", prompt="x")
