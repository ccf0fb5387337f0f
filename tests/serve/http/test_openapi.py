"""Requests made from the OpenAPI description, right ones and wrong ones: no answer but the documented, no error of the
server's own, and nothing of another key's."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok

from tests.serve.http.serving import Running, serving

CASES = int(os.environ.get("PARAFUSE_TESTS_CASES", "6"))
"""Right ones, and as many wrong ones, for each of 9 to 20 operations of three models: 150 make 5,000."""
SLOW = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
]
LEFT_OUT = ("/v1/jobs/{job}/events",)
"""Answers without end where a job waits: tested by hand."""

OWN = ("/v1/images/edits", "/v1/videos", "/v1/videos/{video}/content")
"""What another kind of model answers otherwise."""


@pytest.fixture(scope="module", params=["emoji", "tiny:qwen-image-edit", "tiny:wan2.1-14b"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with serving(request.param, max_queued=100_000, max_queued_of_key=100_000) as running:
        yield running


def test_the_description_is_whole(server: Running) -> None:
    found = server.app.openapi()
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            documented = set(operation["responses"])
            if path.startswith("/v1"):
                assert {"400", "401", "408", "413", "503"} <= documented, (method, path)
            if method == "post":
                assert {"409", "429"} <= documented
                assert "requestBody" in operation


def test_cases_from_the_description(server: Running) -> None:
    """Half of them as described, half of them with something wrong."""
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    checks = CHECKS.get_by_names(["not_a_server_error", "status_code_conformance"])
    headers = {"authorization": f"Bearer {server.secrets[0]}"}
    seen: Counter[int] = Counter()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if operation.path in LEFT_OUT or (server.app.state.service.card.name != "emoji" and operation.path not in OWN):
            continue
        for mode in GenerationMode:

            @settings(
                max_examples=CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                suppress_health_check=SLOW,
            )  # fmt: skip
            @given(case=operation.as_strategy(mode))
            def one(case: schemathesis.Case) -> None:
                answer = case.call(base_url=server.base, headers=headers, timeout=60)
                seen[answer.status_code] += 1
                case.validate_response(answer, checks=checks)  # type: ignore[arg-type]

            with contextlib.suppress(Unsatisfiable):  # nothing of it can be wrong
                one()
    print(f"{server.app.state.service.card.name}: {seen.total()} cases: {dict(sorted(seen.items()))}")
    assert {200, 400} <= set(seen)
