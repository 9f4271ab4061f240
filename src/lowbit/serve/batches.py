"""/v1/batches: https://platform.openai.com/docs/api-reference/batch; what runs them is in batch_worker."""

from __future__ import annotations

import re
import time
from typing import Any

from aiohttp import web

from lowbit.batch.items import URLS
from lowbit.harness import BadRequest, HarnessError
from lowbit.serve import guard
from lowbit.serve.batch_worker import BatchWorker
from lowbit.serve.files import UNFINISHED, listing
from lowbit.serve.openapi_files import WINDOW
from lowbit.serve.store import Json, Store, new_id

_WINDOW = re.compile(WINDOW)
_MOST_KEYS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512
_TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
)  # fmt: skip


class Batches:
    def __init__(self, store: Store, worker: BatchWorker, body_seconds: float) -> None:
        self._store, self._worker, self._body_seconds = store, worker, body_seconds

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/v1/batches", self.create)
        app.router.add_get("/v1/batches", self.list)
        app.router.add_get("/v1/batches/{id}", self.get)
        app.router.add_post("/v1/batches/{id}/cancel", self.cancel)

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await guard.body_of(request, self._body_seconds)
        source = body.get("input_file_id")
        if not isinstance(source, str):
            raise BadRequest("input_file_id must be a file's id", param="input_file_id")
        if body.get("endpoint") not in URLS:
            raise BadRequest(f"endpoint must be one of {', '.join(URLS)}", param="endpoint")
        window, metadata = _window(body.get("completion_window")), _metadata(body.get("metadata"))
        try:
            file = self._store.get("files", source)
        except HarnessError as error:
            raise BadRequest(error.message, param="input_file_id") from None
        if file["purpose"] != "batch":
            raise BadRequest('that file\'s purpose is not "batch"', param="input_file_id")
        self._store.open()
        now = int(time.time())
        record = {
            "id": new_id("batch_"), "object": "batch", "endpoint": body["endpoint"], "errors": None,
            "input_file_id": source, "completion_window": body["completion_window"], "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": now, "expires_at": now + window,
            **dict.fromkeys(_TIMES), "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }  # fmt: skip
        self._store.add("batches", record)
        self._worker.wake()
        return guard.json_response(record)

    async def list(self, request: web.Request) -> web.StreamResponse:
        found = listing(self._store, "batches", request, 20, 100, oldest_first=False)
        return guard.json_response(found | {"data": [_shown(record) for record in found["data"]]})

    async def get(self, request: web.Request) -> web.StreamResponse:
        return guard.json_response(_shown(self._store.get("batches", request.match_info["id"])))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        record = self._store.get("batches", request.match_info["id"])
        self._store.open()
        if record["status"] in ("cancelling", "cancelled"):
            return guard.json_response(_shown(record))
        if record["status"] not in UNFINISHED or record["status"] == "finalizing":
            message = f"a batch that is {record['status']} cannot be cancelled"
            raise HarnessError(message, status=409, code="batch_not_cancellable", param="id")
        changed = self._store.change("batches", record["id"], status="cancelling", cancelling_at=int(time.time()))
        self._worker.wake()
        return guard.json_response(_shown(changed))


def _shown(record: Json) -> Json:
    """Without what the worker keeps for itself."""
    return {key: value for key, value in record.items() if not key.startswith("_")}


def _window(value: Any) -> int:
    """Seconds. OpenAI knows "24h" alone; work on one's own machine may take longer."""
    if not isinstance(value, str) or not _WINDOW.fullmatch(value):
        message = 'completion_window must be "24h", or other hours or days ("72h", "7d")'
        raise BadRequest(message, param="completion_window")
    return int(value[:-1]) * (86400 if value.endswith("d") else 3600)


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    texts = list(value.values()) if isinstance(value, dict) else [None]
    fits = all(isinstance(text, str) and len(text) <= _LONGEST_VALUE for text in texts)
    if not fits or len(texts) > _MOST_KEYS or any(len(key) > _LONGEST_KEY for key in value):
        raise BadRequest(
            f"metadata must be up to {_MOST_KEYS} texts of {_LONGEST_VALUE} characters with names of {_LONGEST_KEY}",
            param="metadata",
        )
    return dict(value)
