"""Gemma 4: <|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>. Read from its chat template."""

from __future__ import annotations

from lowbit.harness.dialects._gemma import GemmaDialect


class Gemma4(GemmaDialect):
    name = "gemma4"
    marks = ("<|tool_call>",)
    begin, end, quote = "<|tool_call>", "<tool_call|>", '<|"|>'
    tool, result = ("<|tool>", "<tool|>"), ("<|tool_response>", "<tool_response|>")


DIALECT = Gemma4()
