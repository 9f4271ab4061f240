"""Gemma 4's drafters in llama.cpp: logits and hidden states beside a target against transformers, and whole answers.

A drafter's context belongs to its target's and reads the target's cache. The calls for it are llama.cpp's staging API
(src/llama-ext.h), which the library exports under C++ names.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_logits import tokens_of

import lowbit
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.errors import RuntimeFailed
from lowbit.run import _llama_h
from lowbit.run.llama_cpp import LlamaCpp

_MTP = 1  # LLAMA_CONTEXT_TYPE_MTP
_STEPS = 4
_LAST = np.s_[-1:]
# Target's layout and changes, drafter's changes. The window is longer than the text, but where it is the subject.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "E2B": ("E2B", {}, {"num_key_value_heads": 1, "ordered": True}),
    "31B": ("31B", {}, {"num_global_key_value_heads": 1, "attention_k_eq_v": True}),
    "12B": ("12B", {}, {"unified": True, "num_global_key_value_heads": 1, "attention_k_eq_v": True}),
}


class Reference:
    """The pair in transformers. ``window``: how many of the last tokens window layers see, None for all."""

    def __init__(self, target: Path, drafter: Path, window: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.window = torch, window
        load = AutoModelForCausalLM.from_pretrained
        self.target = load(target, dtype=torch.float32, attn_implementation="eager").eval()
        self.drafter = load(drafter, dtype=torch.float32, attn_implementation="eager").eval()
        self.drafter.config.use_ordered_embeddings = False  # llama.cpp scores every token
        self.features: list[np.ndarray] = []
        self.drafter.model.register_forward_hook(
            lambda _, __, out: self.features.append(out.last_hidden_state[0, -1].numpy())
        )

    def draft(self, tokens: np.ndarray, steps: int = _STEPS) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logits, next hidden state) of each step, as transformers' SinglePositionMultiTokenCandidateGenerator has
        it: all from the position of the last token, whose keys the target has not computed yet."""
        torch, found = self.torch, []
        with torch.no_grad():
            seen = torch.from_numpy(tokens[:-1])[None].long()
            out = self.target(seen, output_hidden_states=True, return_shared_kv_states=True)
            states = dict(out.shared_kv_states)
            if self.window is not None:
                kind = "sliding_attention"
                states[kind] = tuple(state[:, :, -self.window :] for state in states[kind])
            hidden, token = out.hidden_states[-1][:, _LAST], torch.tensor([[int(tokens[-1])]])
            for _ in range(steps):
                embedded = torch.cat([self.target.get_input_embeddings()(token), hidden], -1)
                position = torch.tensor([[len(tokens) - 1]])
                step = self.drafter(inputs_embeds=embedded, position_ids=position, shared_kv_states=states)
                hidden, token = step.last_hidden_state, step.logits.argmax(-1)
                found.append((step.logits[0, 0].numpy(), hidden[0, 0].numpy()))
        return found

    def continuation(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """``tokens`` and the target's ``n`` most likely next ones."""
        for _ in range(n):
            with self.torch.no_grad():
                logits = self.target(self.torch.from_numpy(tokens)[None].long()).logits[0, -1]
            tokens = np.append(tokens, np.int32(logits.argmax()))
        return tokens


@contextmanager
def llama_cpp_pair(target: Path, drafter: Path) -> Iterator[Callable[[np.ndarray, int], list[Any]]]:
    """draft(tokens, steps) in llama.cpp, as its own MTP drafting has it (common/speculative.cpp)."""
    lib = _llama_h.load().lib
    keep_hidden = lib._Z26llama_set_embeddings_nextnP13llama_contextbb
    keep_hidden.restype, keep_hidden.argtypes = None, [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool]
    hidden_of = lib._Z30llama_get_embeddings_nextn_ithP13llama_contexti
    hidden_of.restype, hidden_of.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]
    stack = ExitStack()

    def opened(path: Path, other: int | None) -> int:
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert model
        stack.callback(lib.llama_model_free, model)
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = params.n_outputs_max_per_seq = 256
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # f32
        params.flash_attn_type, params.swa_full = 0, False
        if other is not None:
            params.ctx_type, params.ctx_other = _MTP, other
        context = lib.llama_init_from_model(model, params)
        assert context
        stack.callback(lib.llama_free, context)
        keep_hidden(context, True, other is not None)
        return int(context)

    with stack, open_checkpoint(drafter) as source:
        main = opened(target, None)
        side, batch = opened(drafter, main), _llama_h.BatchBuffers(256)
        width, vocab = source.config["backbone_hidden_size"], source.config["text_config"]["vocab_size"]

        def draft(tokens: np.ndarray, steps: int) -> list[Any]:
            lib.llama_memory_clear(lib.llama_get_memory(main), True)
            n, token, found = len(tokens) - 1, int(tokens[-1]), []
            assert lib.llama_decode(main, batch.fill(tokens[:-1], 0, n)) == 0
            hidden = np.ctypeslib.as_array(hidden_of(main, n - 1), shape=(width,)).copy()
            for _ in range(steps):
                step = batch.fill(np.array([token], np.int32), n, 1)
                step.embd = hidden.ctypes.data
                assert lib.llama_decode(side, step) == 0
                logits = np.ctypeslib.as_array(lib.llama_get_logits(side), shape=(vocab,)).copy()
                hidden = np.ctypeslib.as_array(hidden_of(side, 0), shape=(width,)).copy()
                token = int(logits.argmax())
                found.append((logits, hidden))
            return found

        yield draft


def packed(folder: Path) -> Path:
    lowbit.pack(folder, "f32", folder / "f32.gguf")
    return folder / "f32.gguf"


def compare(ours: list[Any], theirs: list[Any]) -> None:
    for (our_logits, our_hidden), (logits, hidden) in zip(ours, theirs, strict=True):
        assert our_logits.argmax() == logits.argmax()
        # Of values around 1, after GELU from a table of float16.
        assert np.abs(our_logits - logits).max() < 5e-3
        assert np.abs(our_hidden - hidden).max() < 5e-3
    assert np.ptp([logits for logits, _ in theirs], axis=0).max() > 0.5


@pytest.mark.parametrize("case", CASES)
def test_same_drafts(tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path], case: str) -> None:
    layout, of_target, of_drafter = CASES[case]
    target = tiny_gemma4(layout, **{"sliding_window": 256} | of_target)
    drafter = tiny_gemma4_assistant(**{"sliding_window": 256} | of_drafter)
    reference = Reference(target, drafter)
    with llama_cpp_pair(packed(target), packed(drafter)) as draft:
        for n in (8, 60, 120):
            compare(draft(tokens_of(n=n), _STEPS), reference.draft(tokens_of(n=n)))


def test_window_layers_of_a_drafter_see_the_window_before_its_position(
    tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path]
) -> None:
    """Where the text is longer than the window llama.cpp counts the position itself into it, and transformers counts
    two more (distances up to the window, from the last key). The tokens both see are computed alike."""
    target, drafter = tiny_gemma4("31B", attention_k_eq_v=False), tiny_gemma4_assistant()
    tokens = tokens_of()
    reference = Reference(target, drafter, window=15)
    with llama_cpp_pair(packed(target), packed(drafter)) as draft:
        compare(draft(tokens, _STEPS), reference.draft(tokens))


def test_drafts_are_accepted(tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path]) -> None:
    """llama.cpp's server with the drafter answers as without it, and takes most of what the drafter says.

    The drafter's head is solved for the target's own answer: least squares from the hidden states that transformers
    computes. With other hidden states in llama.cpp it would say something else.
    """
    target = tiny_gemma4("E2B", sliding_window=256)
    drafter = tiny_gemma4_assistant(sliding_window=256, num_key_value_heads=1)
    reference, prompt, n = Reference(target, drafter), tokens_of(n=40), 24
    whole = reference.continuation(prompt, n)
    for end in range(len(prompt) + 1, len(whole)):
        reference.draft(whole[:end], steps=1)
    features, said = np.array(reference.features), whole[len(prompt) + 1 :]
    wanted = np.where(np.arange(320)[:, None] == said, 5.0, -5.0).astype(np.float32)
    tensors = load_file(drafter / "model.safetensors")
    tensors["model.embed_tokens.weight"] = (wanted @ np.linalg.pinv(features.T)).astype(np.float32)
    save_file(tensors, drafter / "model.safetensors", metadata={"format": "pt"})
    alone = answer(packed(target), None, prompt, n)
    helped = answer(target / "f32.gguf", packed(drafter), prompt, n)
    assert helped["choices"][0]["text"] == alone["choices"][0]["text"]
    drafted, accepted = helped["timings"]["draft_n"], helped["timings"]["draft_n_accepted"]
    assert drafted >= n // 3
    assert accepted >= 0.8 * drafted


def answer(target: Path, drafter: Path | None, prompt: np.ndarray, n: int) -> dict[str, Any]:
    """The server's greedy answer, and what it says of the time and the drafts that it took."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(target), 256, 1
    params.warmup, params.fit_params, params.verbosity = False, False, -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if drafter is not None:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        draft = params.speculative.draft
        draft.mparams.path, draft.n_max, draft.p_min = str(drafter), 1, 0.0
        draft.cache_type_k = draft.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    asked = {"prompt": prompt.tolist(), "n_predict": n, "temperature": 0, "ignore_eos": True}
    found = server.handle_completions(asked)
    return json.loads(found) if isinstance(found, str) else dict(found)


@pytest.mark.parametrize("unified", [False, True])
def test_a_packed_drafter_is_read_back_as_the_same_model(
    tiny_gemma4_assistant: Callable[..., Path], tmp_path: Path, unified: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_gemma4_assistant(unified=unified, ordered=True)
    result = lowbit.pack(folder, "f32", tmp_path / "f32.gguf", certificate=True)
    assert result.certificate is not None
    totals = result.certificate.totals
    assert totals["exact"] == totals["blocks"] > 0
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "f32.gguf") as back:
        assert back.names == source.names
        assert all(np.array_equal(back.read(name), source.read(name)) for name in source.names)
        assert back.family.metadata(back.config) == source.family.metadata(source.config)
        write_checkpoint(tmp_path / "back", back, (Tensor(name=name, values=back.read(name)) for name in back.names))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).state_dict()
        assert all(np.array_equal(again[name].numpy(), source.read(name)) for name in source.names)
    for path in (folder, tmp_path / "f32.gguf"):
        found = lowbit.inspect(path)
        assert (found["problem"], found["architecture"], found["layers"]) == (None, "gemma4-assistant", 4)


def test_a_q4_0_drafter_drafts(tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path]) -> None:
    target = packed(tiny_gemma4("E2B"))
    drafter = tiny_gemma4_assistant(num_key_value_heads=1)
    lowbit.pack(drafter, "q4_0", drafter / "q4_0.gguf")
    with llama_cpp_pair(target, drafter / "q4_0.gguf") as draft:
        assert all(np.isfinite(logits).all() for logits, _ in draft(tokens_of(), _STEPS))


def test_a_drafter_alone_is_refused(tiny_gemma4_assistant: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeFailed, match=r"cannot make a context .* It is a drafter, which runs beside its target"):
        LlamaCpp(packed(tiny_gemma4_assistant()), threads=1)
