"""A decoder-only model in LiteRT's operators: a graph for one token, and graphs that read several at a time.

The signatures are those that LiteRT-LM's CPU executor knows (runtime/executor/litert_compiled_model_executor_utils.cc):
``decode`` and ``prefill_N`` take tokens, input_pos, mask and the caches, and give the caches back, ``decode`` with the
logits. Keys are cached as (1, kv_heads, context, head_dim) and values as (1, kv_heads, head_dim, context), float32. The
mask is added to the scores: it hides what comes later, and what a window hides is added here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.checkpoint.decoder import Decoder
from lowbit.pack.tflite_model import Graph, Model, Weight

PREFILL = (128, 16)  # tokens read at a time; a prompt's rest goes into the shortest that holds it
_HIDDEN = 1e6  # taken off a score for each token beyond the window
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def build(decoder: Decoder, weights: Mapping[str, Weight], context: int) -> Model:
    """The whole model. weights: of every tensor of the checkpoint by Hugging Face's name. context: tokens a cache
    holds."""
    model = Model(weights)
    for length in PREFILL:
        if length <= context:
            _Writer(model.graph(f"prefill_{length}"), decoder, length, context).write(logits=False)
    _Writer(model.graph("decode"), decoder, 1, context).write(logits=True)
    return model


class _Writer:
    """One graph under construction, for ``length`` tokens (T below; C is the context, D the head size)."""

    def __init__(self, graph: Graph, decoder: Decoder, length: int, context: int) -> None:
        self.graph, self.decoder, self.length, self.context = graph, decoder, length, context

    def write(self, *, logits: bool) -> None:
        graph, decoder = self.graph, self.decoder
        tokens = graph.input("tokens", (1, self.length), "i32")
        self._positions = graph.input("input_pos", (self.length,), "i32")
        self._mask = graph.input("mask", (1, 1, self.length, self.context))
        keys, values = self._caches()
        embedding = graph.weight(EMBEDDING)
        wide = graph.shape(embedding)[1]
        flat = self._reshape(tokens, (self.length,), dtype="i32")
        rows = graph.op("EMBEDDING_LOOKUP", (flat, embedding), (self.length, wide))
        x = self._reshape(rows, (1, self.length, wide))
        if decoder.embedding_scale != 1:
            x = self._mul(x, graph.floats(decoder.embedding_scale))
        for i in range(len(decoder.windows)):
            is_last = i == len(decoder.windows) - 1
            found = self._attention(i, x, keys[i], values[i], needed=logits or not is_last)
            if found is None:  # nothing reads what the last layer would say of a prompt
                return
            x = self._feed_forward(i, found)
        x = self._norm(x, NORM)
        graph.output("logits", self._linear(x, HEAD if HEAD in graph.model.weights else EMBEDDING))

    def _caches(self) -> tuple[list[int], list[int]]:
        n, size, context = self.decoder.kv_heads, self.decoder.head_dim, self.context
        layers = range(len(self.decoder.windows))
        keys = [self.graph.input(f"kv_cache_k_{i}", (1, n, context, size)) for i in layers]
        values = [self.graph.input(f"kv_cache_v_{i}", (1, n, size, context)) for i in layers]
        return keys, values

    def _attention(self, i: int, x: int, keys: int, values: int, *, needed: bool) -> int | None:
        """The layer's residual stream after attention; None where it is not ``needed`` beyond the caches."""
        decoder, prefix = self.decoder, f"model.layers.{i}"
        heads, n, size, length = decoder.heads, decoder.kv_heads, decoder.head_dim, self.length
        y = self._norm(x, f"{prefix}.input_layernorm.weight")
        key = self._rotate(self._heads(y, f"{prefix}.self_attn.k", n), i)
        value = self._transpose(self._heads(y, f"{prefix}.self_attn.v", n), (0, 1, 3, 2))
        keys = self._update(keys, key, axis=2)
        values = self._update(values, value, axis=3)
        self.graph.output(f"kv_cache_k_{i}", keys)
        self.graph.output(f"kv_cache_v_{i}", values)
        if not needed:
            return None
        query = self._rotate(self._heads(y, f"{prefix}.self_attn.q", heads), i)
        query = self._mul(query, self.graph.floats(decoder.query_scale))
        rows = heads // n * length  # the heads that share a key's, one under another
        query = self._reshape(query, (1, n, rows, size))
        scores = self._matmul(query, keys, (1, n, rows, self.context))
        scores = self._add(scores, self._mask_of(decoder.windows[i], heads // n))
        shares = self.graph.op("SOFTMAX", (scores,), self.graph.shape(scores), options="SoftmaxOptions", beta=1.0)
        seen = self._matmul(shares, values, (1, n, rows, size))
        seen = self._transpose(self._reshape(seen, (1, heads, length, size)), (0, 2, 1, 3))
        seen = self._reshape(seen, (1, length, heads * size))
        after = self._linear(seen, f"{prefix}.self_attn.o_proj.weight")
        if self._has(f"{prefix}.pre_feedforward_layernorm.weight"):  # then this one is of what attention gives
            after = self._norm(after, f"{prefix}.post_attention_layernorm.weight")
        return self._add(x, after)

    def _feed_forward(self, i: int, x: int) -> int:
        prefix = f"model.layers.{i}"
        own, last = f"{prefix}.pre_feedforward_layernorm.weight", f"{prefix}.post_feedforward_layernorm.weight"
        y = self._norm(x, own if self._has(own) else f"{prefix}.post_attention_layernorm.weight")
        gate = self._linear(y, f"{prefix}.mlp.gate_proj.weight")
        shape = self.graph.shape(gate)
        if self.decoder.activation == "silu":
            gate = self._mul(gate, self.graph.op("LOGISTIC", (gate,), shape))
        else:
            gate = self.graph.op("GELU", (gate,), shape, options="GeluOptions", approximate=True)
        y = self._mul(gate, self._linear(y, f"{prefix}.mlp.up_proj.weight"))
        y = self._linear(y, f"{prefix}.mlp.down_proj.weight")
        return self._add(x, self._norm(y, last) if self._has(last) else y)

    # Attention's parts

    def _heads(self, x: int, projection: str, n: int) -> int:
        """Queries, keys or values (1, n, T, D) of ``x``, normed where they have a norm."""
        y = self._linear(x, f"{projection}_proj.weight")
        y = self._reshape(y, (1, self.length, n, self.decoder.head_dim))
        if self._has(f"{projection}_norm.weight"):
            y = self._norm(y, f"{projection}_norm.weight")
        return self._transpose(y, (0, 2, 1, 3))

    def _rotate(self, x: int, i: int) -> int:
        """The two halves of a head against each other: (a, b) becomes (a cos - b sin, b cos + a sin)."""
        rotary = self.decoder.frequencies[i].reshape(1, 1, 1, -1)
        cos, sin = self.graph.once(("turns", rotary.tobytes()), lambda: self._turns(rotary))
        shape = self.graph.shape(x)
        half = (*shape[:3], shape[3] // 2)
        a, b = (self._slice(x, (0, 0, 0, start), half) for start in (0, half[3]))
        first = self._binary("SUB", self._mul(a, cos), self._mul(b, sin))
        second = self._add(self._mul(b, cos), self._mul(a, sin))
        return self._concatenate((first, second), shape, axis=3)

    def _turns(self, rotary: np.ndarray) -> tuple[int, int]:
        """Cosine and sine (1, 1, T, D / 2) of every position's angles."""
        angles = self._mul(self._position(), self.graph.constant(rotary))
        shape = self.graph.shape(angles)
        return self.graph.op("COS", (angles,), shape), self.graph.op("SIN", (angles,), shape)

    def _position(self) -> int:
        """The positions as float32 (1, 1, T, 1)."""
        shape = (1, 1, self.length, 1)
        return self.graph.once(
            "position", lambda: self.graph.op("CAST", (self._reshape(self._positions, shape, dtype="i32"),), shape)
        )

    def _mask_of(self, window: int | None, times: int) -> int:
        """What is added to scores (1, n, times * T, C)."""

        def make() -> int:
            mask = self.graph.once(("window", window), lambda: self._windowed(window))
            shape = (1, 1, times * self.length, self.context)
            return mask if times == 1 else self._concatenate((mask,) * times, shape, axis=2)

        return self.graph.once(("mask", window, times), make)

    def _windowed(self, window: int | None) -> int:
        """The mask (1, 1, T, C), with what hides the tokens that lie before the window."""
        if window is None or window >= self.context:
            return self._mask
        inside = np.arange(self.context, dtype=np.float32).reshape(1, 1, 1, -1) + np.float32(window - 1)
        beyond = self._binary("SUB", self.graph.constant(inside), self._position())  # below 0: before the window
        shape = self.graph.shape(beyond)
        beyond = self.graph.op("MINIMUM", (beyond, self.graph.floats(0.0)), shape, options="MaximumMinimumOptions")
        return self._add(self._mask, self._mul(beyond, self.graph.floats(_HIDDEN)))

    def _update(self, cache: int, new: int, axis: int) -> int:
        """The cache with ``new`` from the first token's position on."""
        at = self.graph.once(("begin", axis), lambda: self._begin(axis))
        return self.graph.op(
            "DYNAMIC_UPDATE_SLICE", (cache, new, at), self.graph.shape(cache), options="DynamicUpdateSliceOptions"
        )

    def _begin(self, axis: int) -> int:
        first = self._reshape(self._slice(self._positions, (0,), (1,), dtype="i32"), (), dtype="i32")
        zero = self.graph.constant(np.array(0, np.int32))
        parts = [first if a == axis else zero for a in range(4)]
        return self.graph.op("PACK", parts, (4,), dtype="i32", options="PackOptions", valuesCount=4, axis=0)

    # Operators

    def _has(self, name: str) -> bool:
        return name in self.graph.model.weights

    def _linear(self, x: int, weight: str) -> int:
        bias = weight.removesuffix(".weight") + ".bias"
        matrix = self.graph.weight(weight)
        inputs = (x, matrix, self.graph.weight(bias) if self._has(bias) else -1)
        shape = (*self.graph.shape(x)[:-1], self.graph.shape(matrix)[0])
        return self.graph.op("FULLY_CONNECTED", inputs, shape, options="FullyConnectedOptions", keepNumDims=True)

    def _norm(self, x: int, weight: str) -> int:
        shape = self.graph.shape(x)
        each = (*shape[:-1], 1)
        squares = self._mul(x, x)
        axis = self.graph.ints(len(shape) - 1)
        mean = self.graph.op("MEAN", (squares, axis), each, options="ReducerOptions", keepDims=True)
        mean = self._add(mean, self.graph.floats(self.decoder.epsilon))
        return self._mul(self._mul(x, self.graph.op("RSQRT", (mean,), each)), self.graph.weight(weight))

    def _binary(self, kind: str, a: int, b: int) -> int:
        shape = np.broadcast_shapes(self.graph.shape(a), self.graph.shape(b))
        return self.graph.op(kind, (a, b), shape, options=f"{kind.capitalize()}Options")

    def _add(self, a: int, b: int) -> int:
        return self._binary("ADD", a, b)

    def _mul(self, a: int, b: int) -> int:
        return self._binary("MUL", a, b)

    def _matmul(self, a: int, b: int, shape: tuple[int, ...]) -> int:
        """``a`` times ``b`` transposed."""
        return self.graph.op("BATCH_MATMUL", (a, b), shape, options="BatchMatMulOptions", adjY=True)

    def _reshape(self, x: int, shape: tuple[int, ...], dtype: str = "f32") -> int:
        return self.graph.op("RESHAPE", (x, self.graph.ints(*shape)), shape, dtype=dtype)

    def _slice(self, x: int, begin: tuple[int, ...], shape: tuple[int, ...], dtype: str = "f32") -> int:
        inputs = (x, self.graph.ints(*begin), self.graph.ints(*shape))
        return self.graph.op("SLICE", inputs, shape, dtype=dtype, options="SliceOptions")

    def _transpose(self, x: int, order: tuple[int, ...]) -> int:
        shape = self.graph.shape(x)
        made = tuple(shape[i] for i in order)
        return self.graph.op("TRANSPOSE", (x, self.graph.ints(*order)), made, options="TransposeOptions")

    def _concatenate(self, parts: tuple[int, ...], shape: tuple[int, ...], axis: int) -> int:
        return self.graph.op("CONCATENATION", parts, shape, options="ConcatenationOptions", axis=axis)
