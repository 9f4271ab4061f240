"""The description at /openapi.json is true: schemathesis makes requests of it, right ones and wrong ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from endpoint import served
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from scripted import Scripted

from lowbit.harness.options import HarnessOptions
from lowbit.serve import ServeOptions, openapi

KEY = "sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# What a description cannot say: that a schema in a request is one, that tools have names of their own, that one of them
# is chosen, that a message leads nowhere. There 400 must name the place.
_DEEPER = ("response_format", "tools", "tool_choice", "messages[", "input", "lowbit", "max_", "n", "prompt[")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint in a thread, with a key, in front of a scripted model."""
    found: list[str] = []
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def go() -> None:
        files = tmp_path_factory.mktemp("files")
        options = ServeOptions(port=0, key=KEY, harness=HarnessOptions(seconds=10, tries=2), files=files)
        async with served(Scripted("Hi."), options) as endpoint:
            found.append(endpoint.root)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(go()))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(done.set)
    thread.join(30)
    loop.close()


PATHS = openapi.document(needs_key=True)["paths"]
OPERATIONS = [(path, method) for path, methods in PATHS.items() for method in methods]


@pytest.fixture(scope="module")
def described(root: str) -> Any:
    return schemathesis.openapi.from_url(f"{root}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path, method", OPERATIONS)
def test_the_description_is_true(described: Any, path: str, method: str, mode: GenerationMode) -> None:
    operation = described[path][method.upper()]
    if mode.is_negative and not (operation.body or operation.path_parameters):
        pytest.skip("nothing can be wrong with it")

    @settings(
        max_examples=30 if operation.body else 5, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        response = case.call(headers=HEADERS)
        excluded = []
        if mode.is_positive and response.status_code in (400, 422):  # 422: "Hi." does not follow the schema
            error = response.json()["error"]
            assert error["code"].startswith("output_") or error["param"].startswith(_DEEPER), response.text
            excluded = [positive_data_acceptance]
        case.validate_response(response, excluded_checks=excluded, headers=HEADERS)

    holds()


@pytest.mark.parametrize("with_files", [True, False])
def test_every_route_is_described(tmp_path: Path, with_files: bool) -> None:
    from lowbit.harness import Harness, HttpUpstream
    from lowbit.serve.app import Limits, Service
    from lowbit.serve.batch_worker import BatchWorker, Served
    from lowbit.serve.metrics import Metrics
    from lowbit.serve.store import Store

    upstream, kept = HttpUpstream("http://127.0.0.1:1/v1"), dict[str, Any]()
    if with_files:
        store, options = Store(tmp_path), HarnessOptions()
        kept = {"store": store, "worker": BatchWorker(store, lambda: Served(upstream, options, slots=1), options)}
    app = Service(Harness(upstream), upstream, Metrics(), Limits(), **kept).app(hosts=(), key=None)
    routes = {(r.method.lower(), r.resource.canonical) for r in app.router.routes() if r.method != "HEAD"}
    described = openapi.document(needs_key=False, files=with_files)["paths"]
    assert routes == {(m, p) for p, methods in described.items() for m in methods}
