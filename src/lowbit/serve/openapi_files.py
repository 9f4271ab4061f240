"""/v1/files and /v1/batches in the description of openapi.py."""

from __future__ import annotations

from typing import Any

from lowbit.batch.items import URLS

Json = dict[str, Any]
_FILE_ID, _BATCH_ID = "^file-[0-9a-f]{24}$", "^batch_[0-9a-f]{24}$"
WINDOW = "^([1-9][0-9]{0,2}h|[1-9][0-9]?d)$"
_TIME: Json = {"type": ["integer", "null"]}


def paths(ref: Any, answers: Any) -> Json:
    """ref, answers: of openapi.py."""
    read = ("401", "403", "404", "429", "500", "503")

    def operation(
        name: str, summary: str, answer: str, errors: tuple[str, ...], *parameters: Json, **more: Any
    ) -> Json:
        found = {"operationId": name, "summary": summary, "responses": answers(answer, errors), **more}
        return found | ({"parameters": list(parameters)} if parameters else {})

    id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    upload = {"required": True, "content": {"multipart/form-data": {"schema": ref("Upload")}}}
    create = {"required": True, "content": {"application/json": {"schema": ref("BatchRequest")}}}
    raw = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    content = operation("file_content", "What is in it", "Error", read, id)
    content["responses"]["200"] = {"description": "OK", "content": raw}
    sent = ("400", "401", "403", "408", "413", "415", "429", "500", "503")
    order = _query("order", {"enum": ["asc", "desc"]})
    return {
        "/v1/files": {
            "post": operation("upload", "Keeps a batch's input", "File", (*sent, "507"), requestBody=upload),
            "get": operation("files", "The files", "Files", ("400", *read), _query("purpose", {"type": "string"}),
                             order, *_pages(10_000)),
        },
        "/v1/files/{id}": {
            "get": operation("file", "One of them", "File", read, id),
            "delete": operation("delete_file", "Removes it", "Deleted", (*read, "409"), id),
        },
        "/v1/files/{id}/content": {"get": content},
        "/v1/batches": {
            "post": operation("create_batch", "Runs a file's requests", "Batch", sent, requestBody=create),
            "get": operation("batches", "The batches", "Batches", ("400", *read), *_pages(100)),
        },
        "/v1/batches/{id}": {"get": operation("batch", "One of them", "Batch", read, id)},
        "/v1/batches/{id}/cancel": {"post": operation("cancel_batch", "Ends it", "Batch", (*read, "409"), id)},
    }  # fmt: skip


def _query(name: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _pages(most: int) -> tuple[Json, Json]:
    limit = {"type": "integer", "minimum": 1, "maximum": most}
    return _query("limit", limit), _query("after", {"type": "string", "minLength": 1})


def schemas(ref: Any) -> Json:
    def listed(name: str) -> Json:
        return {
            "type": "object",
            "required": ["object", "data", "has_more"],
            "properties": {"data": {"type": "array", "items": ref(name)}, "has_more": {"type": "boolean"}},
        }

    status = ["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    count = {"type": "integer", "minimum": 0}
    return {
        "Upload": {
            "type": "object",
            "required": ["file", "purpose"],
            "additionalProperties": False,
            "properties": {
                "file": {"type": "string", "format": "binary", "minLength": 1},
                "purpose": {"const": "batch"},
            },
        },
        "File": {
            "type": "object",
            "required": ["id", "object", "bytes", "created_at", "filename", "purpose"],
            "properties": {
                "id": {"type": "string", "pattern": _FILE_ID},
                "object": {"const": "file"},
                "bytes": count,
                "purpose": {"enum": ["batch", "batch_output"]},
            },
        },
        "Files": listed("File"),
        "BatchRequest": {
            "type": "object",
            "required": ["input_file_id", "endpoint", "completion_window"],
            "properties": {
                "input_file_id": {"type": "string", "pattern": _FILE_ID},
                "endpoint": {"enum": list(URLS)},
                "completion_window": {"type": "string", "pattern": WINDOW},
                "metadata": {
                    "type": ["object", "null"],
                    "maxProperties": 16,
                    "propertyNames": {"maxLength": 64},
                    "additionalProperties": {"type": "string", "maxLength": 512},
                },
            },
        },
        "Batch": {
            "type": "object",
            "required": ["id", "object", "endpoint", "input_file_id", "status", "request_counts", "created_at"],
            "properties": {
                "id": {"type": "string", "pattern": _BATCH_ID},
                "object": {"const": "batch"},
                "status": {"enum": status},
                "output_file_id": {"type": ["string", "null"]},
                "error_file_id": {"type": ["string", "null"]},
                "request_counts": {
                    "type": "object",
                    "properties": dict.fromkeys(("total", "completed", "failed"), count),
                },
                **{f"{name}_at": _TIME for name in ("in_progress", "completed", "failed", "expired", "cancelled")},
            },
        },
        "Batches": listed("Batch"),
    }
