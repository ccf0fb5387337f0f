"""What is deployed says what the server takes: linted by the field's own tools, and held against options, routes and
metrics."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from parafuse.launch.serve.keeper import END_S
from parafuse.launch.serve.messages import CallTimes
from parafuse.launch.serve.settings import Serving
from tests.serve.http.serving import serving, until

DEPLOY = Path(__file__).parents[2] / "deploy"


def options() -> set[str]:
    """Of `parafuse serve`."""
    import typer.main

    from parafuse.launch.cli import app

    command: Any = typer.main.get_command(app)
    return {name for one in command.commands["serve"].params for name in one.opts}


def check_options(words: list[str]) -> None:
    asked = [word for word in words if word.startswith("--")]
    assert asked
    assert set(asked) <= options()


def test_the_dockerfile() -> None:
    lint = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert lint.returncode == 0, lint.stdout
    text = (DEPLOY / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    words = json.loads(entry)
    assert words[2:4] == ["parafuse", "serve"]
    check_options(words[4:])
    (shown,) = re.findall(r"^# +parafuse (--.*)$", text, re.MULTILINE)
    check_options(shown.split())
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((DEPLOY.parent / name).exists() for name in copied.split())


def test_the_unit_of_systemd(tmp_path: Path) -> None:
    text = (DEPLOY / "parafuse.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    words = shlex.split(command)
    check_options(words[2:])
    (asked,) = re.findall(r'PARAFUSE_SERVE="(.*)"', text)
    check_options(shlex.split(asked))
    (patience_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(patience_s) >= float(words[words.index("--drain") + 1]) + 2 * END_S
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze to verify the unit with; its options were held")
    unit = tmp_path / "parafuse.service"  # this machine has neither its user nor its program
    unit.write_text(text.replace(words[0], sys.executable).replace("User=parafuse", "User=root"))
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert str(unit) not in found.stderr


def test_the_manifest_of_kubernetes() -> None:
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    for document in documents.values():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = container["args"]
    check_options(words)
    drain_s = float(words[words.index("--drain") + 1])
    assert pod["terminationGracePeriodSeconds"] >= drain_s + 2 * END_S
    assert container["ports"][0]["containerPort"] == Serving(state="x").port
    with serving(num_keys=0) as server, server.http(None) as http:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = container[probe]["httpGet"]["path"]
            until(lambda path=path: http.get(path).status_code == 200)


def test_the_dashboard_and_the_scrape_job() -> None:
    with serving() as server, server.http() as http:
        server.client().images.generate(prompt="counted")
        http.post("/v1/images/generations", json={"prompt": "x", "seed": -1})
        server.app.state.service.metrics.refused("rate_limited")
        server.app.state.service.metrics.called(CallTimes(kind="image", phases_s={"total": 1.0}))
        (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
        page = until(
            lambda: (text := http.get(job.get("metrics_path", "/metrics")).text).count("rank_seconds") and text
        )
    there = {sample.name: set(sample.labels) for one in text_string_to_metric_families(page) for sample in one.samples}
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    for panel in panels:
        for target in panel["targets"]:
            promql_parser.parse(target["expr"])
            for name in re.findall(r"parafuse_\w+", target["expr"]):
                assert name in there, (panel["title"], name)
                grouped = re.findall(r"by \(([\w, ]+)\)", target["expr"])
                asked = {label.strip() for group in grouped for label in group.split(",")}
                asked |= set(re.findall(r"(\w+)[=!]~?\"", target["expr"]))
                assert asked <= there[name], (panel["title"], asked - there[name])
    shown = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"parafuse_\w+", target["expr"])
    }
    families = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in there}
    missing = families - {re.sub(r"_(total|bucket)$", "", name) for name in shown}
    assert not missing, "every metric is on the dashboard"
