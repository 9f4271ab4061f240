"""What a .litertlm holds beside the model: its header, what LiteRT-LM knows of the model, and the tokenizer.

A file is the magic, a version, where the header ends, the header (a flatbuffer), and sections at multiples of 16 KiB.
Source: litert_lm_builder (litertlm_builder.py, litertlm_core.py) and runtime/proto/llm_metadata.proto of LiteRT-LM. Its
own builder copies whole files and writes the time of day into the header; here the same input gives the same bytes.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.litert_library import header_schema, llm_metadata
from lowbit.checkpoint.litertlm_file import CONFIG, HEADER_BEGIN, MAGIC
from lowbit.checkpoint.model import read_json
from lowbit.errors import BadConfig, Unsupported
from lowbit.pack import model_folder

BLOCK = 16 * 1024  # sections begin at a multiple of it
_VERSION = (1, 5, 0)  # of the format; LiteRT-LM 0.18 opens it, litert-lm-builder writes 1.7.0
_MODEL_TYPE = "tf_lite_prefill_decode"
_TEMPLATES = ("gemma3", "qwen3")  # families whose calls and roles LiteRT-LM knows by a name of their own


@dataclass(frozen=True, kw_only=True)
class Section:
    """kind: a name of AnySectionDataType. size: bytes; ``data`` where they are at hand. items: its key-values."""

    kind: str
    size: int
    data: bytes = b""
    items: Mapping[str, str]


def header(sections: Sequence[Section], config: Mapping[str, Any], written_by: str) -> tuple[bytes, list[int]]:
    """The file's beginning, and where each section begins. config: the text model's, which the file carries along."""
    schema = header_schema()
    entries = {"lowbit": written_by, CONFIG: json.dumps(config, sort_keys=True)}
    tables = [_table(schema, section) for section in sections]
    root = schema.LiteRTLMMetaDataT(
        systemMetadata=schema.SystemMetadataT(entries=[_entry(schema, *pair) for pair in entries.items()]),
        sectionMetadata=schema.SectionMetadataT(objects=tables),
    )
    end = HEADER_BEGIN + len(_flatbuffer(root))
    at, begins = end, []
    for section, table in zip(sections, tables, strict=True):
        at = -(-at // BLOCK) * BLOCK
        begins.append(at)
        table.beginOffset, table.endOffset = at, at + section.size
        at += section.size
    raw = _flatbuffer(root)
    assert HEADER_BEGIN + len(raw) == end
    return MAGIC + struct.pack("<III4xQ", *_VERSION, end) + raw, begins


def model(size: int) -> Section:
    """The section of the .tflite, whose bytes are streamed."""
    return Section(kind="TFLiteModel", size=size, items={"model_type": _MODEL_TYPE})


def metadata(checkpoint: Checkpoint, folder: Path, context: int, longest_prefill: int) -> Section:
    """Beginning and end of text, the chat template, and how long a conversation may get.

    folder: where the tokenizer's files lie. A prompt's last run is padded to the length of its graph, and what is
    padded must lie within the cache: the last places are left out of what LiteRT-LM is told.
    """
    message, config = llm_metadata(), checkpoint.config
    message.max_num_tokens = max(1, context - longest_prefill + 1)
    family = checkpoint.family.name
    getattr(message.llm_model_type, family if family in _TEMPLATES else "generic_model").SetInParent()
    if isinstance(begin := config.get("bos_token_id"), int) and _adds_begin(folder, begin):
        message.start_token.token_ids.ids.append(begin)
    for end in _ends(folder, config):
        message.stop_tokens.add().token_ids.ids.append(end)
    template = _template(folder)
    if template is not None:
        message.jinja_prompt_template = template
    data = message.SerializeToString(deterministic=True)
    return Section(kind="LlmMetadataProto", size=len(data), data=data, items={})


def tokenizer(checkpoint: Checkpoint, folder: Path) -> Section:
    """tokenizer.json, compressed, or else tokenizer.model. Raises NotFound."""
    fast, spm = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        raw = fast.read_bytes()
        data = len(raw).to_bytes(8, "little") + zlib.compress(raw)
        return Section(kind="HF_Tokenizer_Zlib", size=len(data), data=data, items={})
    data = spm.read_bytes()
    return Section(kind="SP_Tokenizer", size=len(data), data=data, items={})


def beside(checkpoint: Checkpoint, context: int, longest_prefill: int) -> list[Section]:
    """Metadata and tokenizer. Raises NotFound where there is no tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_folder.write_tokenizer(folder, checkpoint)
        return [metadata(checkpoint, folder, context, longest_prefill), tokenizer(checkpoint, folder)]


def _adds_begin(folder: Path, begin: int) -> bool:
    """Whether texts begin with that token: by tokenizer_config.json, or what tokenizer.json puts around a text."""
    settings = _json(folder / "tokenizer_config.json")
    if isinstance(settings.get("add_bos_token"), bool):
        return bool(settings["add_bos_token"])
    processor = _json(folder / "tokenizer.json").get("post_processor")
    return isinstance(processor, dict) and f'"ids": [{begin}]' in json.dumps(processor)


def _ends(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer: generation_config.json's, else config.json's."""
    for settings in (_json(folder / "generation_config.json"), config):
        found = settings.get("eos_token_id")
        if found is not None:
            return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]
    raise Unsupported("no token ends a text", found="no eos_token_id", hint="Add it to config.json")


def _template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, BadConfig) if path.is_file() else {}


def _table(schema: Any, section: Section) -> Any:
    return schema.SectionObjectT(
        items=[_entry(schema, *pair) for pair in section.items.items()],
        dataType=getattr(schema.AnySectionDataType, section.kind),
        beginOffset=1,  # an offset of 0 would be left out, and the header shorter
        endOffset=1,
    )


def _entry(schema: Any, key: str, value: str) -> Any:
    return schema.KeyValuePairT(key=key, value=schema.StringValueT(value), valueType=schema.VData.StringValue)


def _flatbuffer(root: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(BLOCK)
    builder.Finish(root.Pack(builder))
    return bytes(builder.Output())
