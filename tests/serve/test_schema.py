"""The gateway's OpenAPI document as judge: schemathesis makes requests from it and holds the answers against it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS

from tests.serve.conftest import Running, fakes, gateways

CHOSEN = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection",
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Iterator[Running]:
    with gateways() as run:
        yield run(fakes())


@pytest.fixture(scope="module")
def api(target: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{target.url}/openapi.json")


OPERATIONS = (
    ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"), ("POST", "/chat"), ("POST", "/v1/embeddings"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/generate"),
)  # fmt: skip


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
TRIED = [(*item, POSITIVE) for item in OPERATIONS] + [(*item, NEGATIVE) for item in OPERATIONS if item[0] == "POST"]


@pytest.mark.parametrize(("method", "path", "mode"), TRIED)
def test_every_answer_is_as_documented(
    api: schemathesis.BaseSchema, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=[CHECKS.get_one(name) for name in CHOSEN], timeout=10)

    ask()


def test_every_route_and_every_body_is_documented(target: Running) -> None:
    document = target.ask("GET", "/openapi.json").json
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert documented == set(OPERATIONS)
    text = str(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text
