"""A tiny real model for a release, and how files of one are spoiled."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lowbit.check import check
from lowbit.checkpoint.gguf_file import Field, GgufFile, TensorHead, write_header

TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- 'Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message['role'] == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def shared() -> ModuleType:
    """tests/conftest.py as a module, for what is no fixture in it."""
    spec = importlib.util.spec_from_file_location("shared_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def change_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(found | changes), "utf-8")


def change_gguf(path: Path, change: Callable[[Field], Field | None]) -> None:
    """Writes a GGUF again with other key-values; ``change`` gives the field to write, or None to leave it out."""
    file = GgufFile(path)
    fields = [new for new in map(change, file.fields) if new is not None]
    from gguf.constants import GGMLQuantizationType

    heads = [TensorHead(n, e.shape, int(GGMLQuantizationType[e.dtype])) for n, e in file.entries.items()]
    data = {name: file.raw(name).tobytes() for name in file.entries}
    file.close()
    with open(path, "wb") as handle:
        for offset, content in zip(write_header(handle, fields, heads), data.values(), strict=True):
            handle.seek(offset)
            handle.write(content)


def set_key(path: Path, key: str, value: Any) -> None:
    """One key of a GGUF; None takes it out."""
    change_gguf(path, lambda f: f if f.key != key else None if value is None else f._replace(value=value))


def save_base(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A tiny llama with the byte tokenizer, which begins texts with a token, and a template that knows tools."""
    import torch
    from transformers import LlamaConfig

    common = shared()
    sizes = common.TINY_LLAMA | {"bos_token_id": 0, "num_hidden_layers": 2, "intermediate_size": 96} | changes
    model = common.save_tiny(folder, LlamaConfig(**sizes))
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        model.save_pretrained(folder)
    bos = common.SPECIAL[0]
    template = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    change_json(folder / "tokenizer.json", post_processor={
        "type": "TemplateProcessing", "single": [template, text], "pair": [template, text, template, text],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    })  # fmt: skip
    change_json(folder / "tokenizer_config.json", bos_token=bos, chat_template=TEMPLATE, pad_token=bos)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [2]}))


def failures(root: Path, **options: Any) -> dict[str, str]:
    """What fails in a release: {check: detail}."""
    return {c["name"]: c["detail"] for c in check(root, **options)["checks"] if c["status"] == "fail"}
