"""The generated readers and writers of LiteRT's two file formats, imported when a file is at hand."""

from __future__ import annotations

from typing import Any

from lowbit.errors import NotFound

_HINT = "Run: pip install 'lowbit[litert]'"


def tflite_schema() -> Any:
    """The module of tables that a .tflite model is made of. Raises NotFound where LiteRT is not installed."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise NotFound("LiteRT is not installed", found=error, hint=_HINT) from error
    return schema_py_generated


def header_schema() -> Any:
    """The module of tables that a .litertlm's header is made of. Raises NotFound where LiteRT-LM is not installed."""
    try:
        from litert_lm_builder import litertlm_header_schema_py_generated
    except ImportError as error:
        raise NotFound("LiteRT-LM is not installed", found=error, hint=_HINT) from error
    return litertlm_header_schema_py_generated


def llm_metadata() -> Any:
    """An empty LlmMetadata message: what LiteRT-LM knows of a model beside its graph. Raises NotFound."""
    try:
        from litert_lm_builder.runtime.proto import llm_metadata_pb2
    except ImportError as error:
        raise NotFound("LiteRT-LM is not installed", found=error, hint=_HINT) from error
    return llm_metadata_pb2.LlmMetadata()
