"""The architecture of a llama written out in numpy, experts included: what llama.cpp's numbers are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def numpy_llama(path: Path, ids: np.ndarray, inputs: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Logits, (n, n_vocab), of the F32 llama in a GGUF file: float64, no cache, tied output.

    inputs: is filled with what flows into each weight, (n, its columns); of experts a list of an array each.
    """
    seen: dict[str, Any] = {} if inputs is None else inputs
    reader = gguf.GGUFReader(path)
    w = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
    heads = int(reader.fields["llama.attention.head_count"].contents())
    layers = int(reader.fields["llama.block_count"].contents())
    x = w["token_embd.weight"][ids]  # (n, width)
    n, width = x.shape
    d = width // heads

    def norm(h: np.ndarray) -> np.ndarray:
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)

    def rope(h: np.ndarray) -> np.ndarray:  # (n, k, d), neighbouring pairs rotate together
        angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
        even, odd = h[..., ::2], h[..., 1::2]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(h.shape)

    mask = np.triu(np.full((n, n), -np.inf), 1)
    for i in range(layers):
        h = norm(x)
        seen |= {f"blk.{i}.attn_{name}.weight": h for name in "qkv"}
        q = rope((h @ w[f"blk.{i}.attn_q.weight"].T).reshape(n, heads, d))
        k = rope((h @ w[f"blk.{i}.attn_k.weight"].T).reshape(n, 1, d))[:, 0]
        v = h @ w[f"blk.{i}.attn_v.weight"].T
        scores = np.einsum("qhd,kd->hqk", q, k) / np.sqrt(d) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,kd->qhd", p, v).reshape(n, width)
        seen[f"blk.{i}.attn_output.weight"] = mixed
        x = x + mixed @ w[f"blk.{i}.attn_output.weight"].T
        x = x + feed_forward(norm(x), w, f"blk.{i}.ffn_", seen)
    return norm(x) @ w["token_embd.weight"].T


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def feed_forward(h: np.ndarray, w: dict[str, np.ndarray], start: str, seen: dict[str, Any]) -> np.ndarray:
    router = f"{start}gate_inp.weight"
    if router not in w:
        inner = silu(h @ w[f"{start}gate.weight"].T) * (h @ w[f"{start}up.weight"].T)
        seen |= {f"{start}gate.weight": h, f"{start}up.weight": h, f"{start}down.weight": inner}
        return inner @ w[f"{start}down.weight"].T
    logits = h @ w[router].T
    chosen = np.argsort(-logits, -1)[:, :2]
    weights = np.exp(np.take_along_axis(logits, chosen, -1))
    weights /= weights.sum(-1, keepdims=True)
    gate, up, down = (w[f"{start}{name}_exps.weight"] for name in ("gate", "up", "down"))
    y, outer, inner = np.zeros_like(h), [], []
    for expert in range(len(gate)):
        token, slot = np.nonzero(chosen == expert)
        outer.append(h[token])
        inner.append(silu(h[token] @ gate[expert].T) * (h[token] @ up[expert].T))
        y[token] += weights[token, slot][:, None] * (inner[-1] @ down[expert].T)
    seen |= {router: h, f"{start}gate_exps.weight": outer, f"{start}up_exps.weight": outer}
    seen[f"{start}down_exps.weight"] = inner
    return y
