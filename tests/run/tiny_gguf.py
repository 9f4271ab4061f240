"""Tiny random llama models as GGUF files, written straight with gguf-py, with a byte-level BPE tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]


def write_tiny(
    path: Path,
    *,
    seed: int = 0,
    noise: float = 0.0,
    merges: tuple[str, ...] = ("t h", "th e", "i n", "a n"),
    extra_tokens: int = 0,
    add_bos: bool = False,
    template: str | None = TEMPLATE,
    width: int = 64,
    layers: int = 2,
    experts: int = 0,
) -> Path:
    """A llama of random weights, with ``experts`` a mixture of which each token is sent to two; ``noise`` is added
    to the same weights, for a worse copy of the same model."""
    heads, ffn = 2, 2 * width
    tokens = [*SPECIALS, *byte_letters(), *("".join(m.split()) for m in merges)]
    tokens += [f"<unused{i}>" for i in range(extra_tokens)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIALS or t.startswith("<unused") else normal for t in tokens])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    if template:
        writer.add_chat_template(template)
    rng, spoil = np.random.default_rng(seed), np.random.default_rng(seed + 1)

    def add(name: str, *shape: int, scale: float) -> None:
        values = rng.normal(size=shape) * scale
        writer.add_tensor(name, (values + spoil.normal(size=shape) * scale * noise).astype(np.float32))

    add("token_embd.weight", len(tokens), width, scale=0.5)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
        add(f"blk.{i}.attn_q.weight", width, width, scale=width**-0.5)
        add(f"blk.{i}.attn_k.weight", width // heads, width, scale=width**-0.5)
        add(f"blk.{i}.attn_v.weight", width // heads, width, scale=width**-0.5)
        add(f"blk.{i}.attn_output.weight", width, width, scale=width**-0.5)
        if experts:
            add(f"blk.{i}.ffn_gate_inp.weight", experts, width, scale=width**-0.5)
            add(f"blk.{i}.ffn_gate_exps.weight", experts, ffn, width, scale=width**-0.5)
            add(f"blk.{i}.ffn_up_exps.weight", experts, ffn, width, scale=width**-0.5)
            add(f"blk.{i}.ffn_down_exps.weight", experts, width, ffn, scale=ffn**-0.5)
            continue
        add(f"blk.{i}.ffn_gate.weight", ffn, width, scale=width**-0.5)
        add(f"blk.{i}.ffn_up.weight", ffn, width, scale=width**-0.5)
        add(f"blk.{i}.ffn_down.weight", width, ffn, scale=ffn**-0.5)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prose(n_words: int, seed: int = 0) -> str:
    """Made-up text with the usual mixture of words, lines and punctuation."""
    rng = np.random.default_rng(seed)
    words = [
        "the",
        "of",
        "and",
        "in",
        "a",
        "thing",
        "rain",
        "went",
        "on",
        "then",
        "he",
        "said",
        "that",
        "42",
        "else,",
        "(But)",
    ]
    words += ["why?", "café", "nothing.", "end.\n\n", "Thin\n", " "]
    return " ".join(words[i] for i in rng.integers(0, len(words), n_words)).replace("\n ", "\n")
