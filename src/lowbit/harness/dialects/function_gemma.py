"""FunctionGemma, the Gemma 3 270M that calls functions: <start_function_call>call:name{key:<escape>text<escape>}
<end_function_call>. Read from its chat template."""

from __future__ import annotations

from lowbit.harness.dialects._gemma import GemmaDialect


class FunctionGemma(GemmaDialect):
    name = "function_gemma"
    marks = ("<start_function_call>",)
    begin, end, quote = "<start_function_call>", "<end_function_call>", "<escape>"
    tool = ("<start_function_declaration>", "<end_function_declaration>")
    result = ("<start_function_response>", "<end_function_response>")


DIALECT = FunctionGemma()
