"""/openapi.json: the endpoint described, by hand. What it says of a request is what is checked; where it says nothing
of a key, any value goes on to the model's server, which may refuse it.
"""

from __future__ import annotations

from typing import Any

import lowbit
from lowbit.harness import dialects
from lowbit.harness.options import LAYERS
from lowbit.harness.request import ROLES
from lowbit.serve import openapi_files

Json = dict[str, Any]
_ERRORS = {
    "400": "The request is wrong; error.param names where",
    "401": "The API key is missing or wrong",
    "403": "This host name is not served here, or pages of this origin may not ask",
    "404": "There is no such thing",
    "409": "It is not in a state for that",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "415": "The Content-Type is another than it must be",
    "422": "No try gave a valid answer; lowbit says what was tried",
    "429": "Too many requests are open",
    "500": "A fault of lowbit's own",
    "502": "The model's server cannot be reached, or failed",
    "503": "The model is not loaded yet, or the folder of files cannot be used",
    "504": "The model's server took too long",
    "507": "There is no room on the disk",
}
_ASKED = ("400", "401", "403", "404", "408", "413", "415", "422", "429", "500", "502", "503", "504")
_READ = ("401", "403", "404", "429", "500", "502", "503", "504")


def document(*, needs_key: bool, files: bool = True) -> Json:
    """The description. needs_key: whether requests need a bearer token. files: whether there are files and batches."""
    found: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "lowbit serve",
            "version": lowbit.__version__,
            "description": "OpenAI's API in front of a model on this machine, made reliable: answers follow their "
            'schema or are an honest error; what was done is under "lowbit".',
        },
        "paths": _PATHS | (openapi_files.paths(_ref, _answers) if files else {}),
        "components": {
            "schemas": _SCHEMAS | openapi_files.schemas(_ref),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return found | ({"security": [{"key": []}]} if needs_key else {})


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _whole(least: int, most: int | None = None) -> Json:
    return {"type": ["integer", "null"], "minimum": least} | ({"maximum": most} if most is not None else {})


def _answers(schema: str, errors: tuple[str, ...], *, stream: bool = False) -> Json:
    content: Json = {"application/json": {"schema": _ref(schema)}}
    if stream:
        content["text/event-stream"] = {"schema": _ref("Event")}
    found: Json = {"200": {"description": "OK", "content": content}}
    for status in errors:
        error = {"application/json": {"schema": _ref("Error")}}
        found[status] = {"description": _ERRORS[status], "content": error}
    return found


def _post(name: str, summary: str, request: str, answer: str) -> Json:
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    responses = _answers(answer, _ASKED, stream=True)
    return {"operationId": name, "summary": summary, "requestBody": body, "responses": responses}


def _get(name: str, summary: str, answer: str, *, parameter: str = "") -> Json:
    found: Json = {"operationId": name, "summary": summary, "responses": _answers(answer, _READ)}
    if parameter:
        given = {"name": parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        found["parameters"] = [given]
    return found


_PATHS: Json = {
    "/v1/chat/completions": {"post": _post("chat", "An answer in a conversation", "ChatRequest", "Chat")},
    "/v1/completions": {"post": _post("complete", "A text that goes on", "TextRequest", "Text")},
    "/v1/responses": {"post": _post("respond", "An answer in the newer form", "ResponseRequest", "Response")},
    "/v1/responses/{id}": {
        "get": _get("response", "An answer that is kept", "Response", parameter="id"),
        "delete": _get("forget", "Forgets it, and the conversation behind it", "Deleted", parameter="id"),
    },
    "/v1/models": {"get": _get("models", "The models", "Models")},
    "/v1/models/{model}": {"get": _get("model", "One of them", "Model", parameter="model")},
    "/health": {
        "get": {
            "operationId": "health", "summary": "Whether the model answers", "security": [],
            "responses": {
                "200": {"description": "It does", "content": {"application/json": {"schema": _ref("Health")}}},
                "403": {"description": _ERRORS["403"], "content": {"application/json": {"schema": _ref("Error")}}},
                "429": {"description": _ERRORS["429"], "content": {"application/json": {"schema": _ref("Error")}}},
                "503": {"description": "It does not", "content": {"application/json": {"schema": _ref("Health")}}},
            },
        }
    },
    "/metrics": {
        "get": {
            "operationId": "metrics", "summary": "What was done, in Prometheus' form",
            "responses": _answers("Error", ("401", "403", "429", "500"))
            | {"200": {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}},
        }
    },
    "/openapi.json": {
        "get": {
            "operationId": "openapi", "summary": "This description", "security": [],
            "responses": _answers("Anything", ("403", "429")),
        }
    },
}  # fmt: skip

_TEXT_OR_PARTS: Json = {
    "anyOf": [
        {"type": ["string", "null"]},
        {
            "type": "array",
            "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
        },
    ]
}
_CALL: Json = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": {},
        "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    },
}
_USAGE: Json = {
    "type": ["object", "null"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}
_SCHEMAS: Json = {
    "Event": {
        "description": 'With "stream": true. data is a chunk as JSON, an error, or [DONE]',
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    },
    "Anything": {"type": "object"},
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
            },
            "lowbit": _ref("Done"),
        },
    },
    "Done": {
        "description": "What the harness did; of several choices, for each",
        "type": "object",
        "properties": {
            "tries": {"type": "integer"},
            "fallback": {"type": "string"},
            "events": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["layer", "what", "detail"],
                    "properties": {
                        "layer": {"enum": [*LAYERS, "upstream"]},
                        "what": {"type": "string"},
                        "detail": {"type": "string"},
                    },
                },
            },
            "usage": _USAGE,
            "choices": {"type": "array", "items": _ref("Done")},
        },
    },
    "Bounds": {
        "description": "Bounds and layers for this request alone, within the server's",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "tries": _whole(1),
            "token_budget": _whole(1),
            "seconds": {"type": ["number", "null"], "exclusiveMinimum": 0},
            "layers": {"type": ["array", "null"], "items": {"enum": list(LAYERS)}},
            "same_call": _whole(1),
            "max_steps": _whole(0),
            "required": {"type": ["array", "null"], "items": {"type": "string"}},
            "dialect": {"enum": [*dialects.names(), None], "description": "how the model writes tool calls"},
            "nudge": {"type": ["boolean", "null"], "description": "an announced call that is not made is a failure"},
        },
    },
    "Message": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": _TEXT_OR_PARTS,
            "tool_calls": {"type": ["array", "null"], "items": _CALL},
        },
    },
    "Tool": {
        "type": "object",
        "required": ["function"],
        "properties": {
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string", "minLength": 1}, "parameters": {}, "description": {}},
            }
        },
    },
    "Format": {
        "type": ["object", "null"],
        "required": ["type"],
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {}},
    },
    "ChatRequest": {
        "type": "object",
        "required": ["messages"],
        "properties": {
            "model": {},
            "messages": {"type": "array", "minItems": 1, "items": _ref("Message")},
            "stream": {"type": ["boolean", "null"]},
            "stream_options": {},
            "n": _whole(1, 128),
            "max_tokens": _whole(1),
            "max_completion_tokens": _whole(1),
            "tools": _or_null({"type": "array", "items": _ref("Tool")}),
            "tool_choice": {"description": "auto, none, required, or one of the tools"},
            "parallel_tool_calls": {},
            "response_format": _ref("Format"),
            "temperature": {},
            "lowbit": _ref("Bounds"),
        },
    },
    "Chat": {
        "type": "object",
        "required": ["choices", "lowbit"],
        "properties": {
            "object": {"const": "chat.completion"},
            "choices": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["index", "message", "finish_reason"],
                    "properties": {"index": {"type": "integer"}, "message": _ref("Message")},
                },
            },
            "usage": _USAGE,
            "lowbit": _ref("Done"),
        },
    },
    "TextRequest": {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            "prompt": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]},
            "stream": {"type": ["boolean", "null"]},
            "lowbit": _ref("Bounds"),
        },
    },
    "Text": {
        "type": "object",
        "required": ["choices", "lowbit"],
        "properties": {
            "choices": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
            },
            "usage": _USAGE,
            "lowbit": _ref("Done"),
        },
    },
    "Item": {
        "description": "message, function_call, function_call_output or reasoning",
        "type": "object",
        "properties": {"type": {"enum": ["message", "function_call", "function_call_output", "reasoning", None]}},
    },
    "ResponseRequest": {
        "type": "object",
        "required": ["input"],
        "properties": {
            "model": {},
            "input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ref("Item")}]},
            "instructions": {"type": ["string", "null"]},
            "max_output_tokens": _whole(1),
            "previous_response_id": {"type": ["string", "null"]},
            "store": {"type": ["boolean", "null"]},
            "stream": {"type": ["boolean", "null"]},
            "text": {"description": "format: as response_format of a chat"},
            "tools": {"type": ["array", "null"], "items": _ref("Function")},
            "tool_choice": {"description": "auto, none, required, or one of the tools"},
            "background": {"enum": [False, None]},
            "conversation": {"enum": [False, None]},
            "prompt": {"enum": [False, None]},
            "lowbit": _ref("Bounds"),
        },
    },
    "Function": {
        "type": "object",
        "required": ["type", "name"],
        "properties": {"type": {"const": "function"}, "name": {"type": "string", "minLength": 1}, "parameters": {}},
    },
    "Response": {
        "type": "object",
        "required": ["id", "object", "status", "output"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "response"},
            "status": {"enum": ["completed", "incomplete"]},
            "output": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["type"],
                    "properties": {"type": {"enum": ["message", "reasoning", "function_call"]}},
                },
            },
            "usage": {"type": ["object", "null"]},
            "lowbit": _or_null(_ref("Done")),
        },
    },
    "Deleted": {
        "type": "object",
        "required": ["id", "deleted"],
        "properties": {"id": {"type": "string"}, "deleted": {"const": True}},
    },
    "Models": {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "array", "items": _ref("Model")}},
    },
    "Model": {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}},
    "Health": {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"enum": ["ok", "error"]}, "error": {"type": "string"}},
    },
}
