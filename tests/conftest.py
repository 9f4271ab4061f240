"""Tiny random models of real transformers classes, and real tokenizers, for every test that needs a model on disk."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit import console
from lowbit.checkpoint import resolve
from lowbit.errors import NotFound

sys.path.insert(0, str(Path(__file__).parent))  # what tests share beside this file

from tiny_configs import GEMMA4_LAYOUTS, TINY_GEMMA3, TINY_GEMMA4, TINY_LLAMA, TINY_QWEN3

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA4_SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
]  # fmt: skip


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A test that ran a command with --quiet leaves the others their progress and log lines."""
    yield
    console.set_quiet(False)


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of 3 special tokens, 256 bytes and a few merges, split as SmolLM's."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    characters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(rest)}
    merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["i", "n"], ["Ġ", "a"], ["e", "r"], ["in", "g"]]
    words = [*SPECIAL, *(characters[b] for b in range(256)), *("".join(m) for m in merges)]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": word, **added} for i, word in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words)}, "merges": merges,
        },
    }  # fmt: skip


def gemma4_tokenizer() -> dict[str, Any]:
    """A tokenizer.json in the shape of Gemma 4's, BPE with byte fallback, of 299 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    characters = ["▁", "t", "h", "e", "i", "n", "a", "r", "g", "\n"]
    merges = [("\n", "\n"), ("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "a"), ("e", "r")]
    words = [*GEMMA4_SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *characters, *("".join(m) for m in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in GEMMA4_SPECIAL])
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def gemma4_tokenizer_settings() -> dict[str, Any]:
    """The keys of Gemma 4's tokenizer_config.json that name tokens."""
    names = {f"{word.strip('<>')}_token": word for word in GEMMA4_SPECIAL[:5]}
    others = dict(zip(("std", "etd", "stc", "etc", "str", "etr", "escape", "think"), GEMMA4_SPECIAL[5:], strict=False))
    others |= {"soc": "<|channel>", "eoc": "<channel|>", "sot": "<|turn>", "eot": "<turn|>"}
    return names | {f"{key}_token": word for key, word in others.items()} | {"tokenizer_class": "GemmaTokenizer"}


def as_gemma4(model: Any) -> None:
    """Makes a random model's scales as a trained one's: Gemma 4 does not divide attention by the root of the head's
    size, so the norms of queries and keys are small; and each layer has a scalar of its own."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.7, 1.2)


def save_tiny(folder: Path, config: Any, *, tokenizer: bool = True, adjust: Callable[[Any], None] | None = None) -> Any:
    """Saves a random model of ``config``'s class, norms and biases random too, and returns it, float32, in eval."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    if adjust:
        adjust(model)
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()), encoding="utf-8")
        names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2], "unk_token": SPECIAL[0]}
        template = {"chat_template": "{{ messages[0]['content'] }}"}
        settings = names | template | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Any]:
    """``save_tiny``, for test files that cannot import this one by its name."""
    return save_tiny


@pytest.fixture(scope="session")
def save_tiny_llama() -> Callable[..., Any]:
    """save_tiny_llama(folder, tokenizer=True, **changes) saves one anywhere and gives the model."""

    def save(folder: Path, *, tokenizer: bool = True, **changes: Any) -> Any:
        from transformers import LlamaConfig

        return save_tiny(folder, LlamaConfig(**TINY_LLAMA | changes), tokenizer=tokenizer)

    return save


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., Path]:
    """tiny_llama(**changes) saves a tiny LlamaForCausalLM with a tokenizer and gives its folder."""

    def make(**changes: Any) -> Path:
        from transformers import LlamaConfig

        save_tiny(tmp_path / "llama", LlamaConfig(**TINY_LLAMA | changes))
        return tmp_path / "llama"

    return make


@pytest.fixture
def tiny_qwen3(tmp_path: Path) -> Callable[..., Path]:
    """tiny_qwen3(**changes) saves a tiny Qwen3ForCausalLM with a tokenizer and gives its folder."""

    def make(**changes: Any) -> Path:
        from transformers import Qwen3Config

        save_tiny(tmp_path / "qwen3", Qwen3Config(**TINY_QWEN3 | changes))
        return tmp_path / "qwen3"

    return make


@pytest.fixture
def tiny_gemma3(tmp_path: Path) -> Callable[..., Path]:
    """tiny_gemma3(**changes) saves a tiny Gemma3ForCausalLM with a tokenizer and gives its folder."""

    def make(**changes: Any) -> Path:
        from transformers import Gemma3TextConfig

        save_tiny(tmp_path / "gemma3", Gemma3TextConfig(**TINY_GEMMA3 | changes))
        return tmp_path / "gemma3"

    return make


def save_tiny_gemma4(folder: Path, config: Any) -> None:
    """As ``save_tiny``, with Gemma 4's tokenizer."""
    save_tiny(folder, config, tokenizer=False, adjust=as_gemma4)
    (folder / "tokenizer.json").write_text(json.dumps(gemma4_tokenizer()), encoding="utf-8")
    settings = gemma4_tokenizer_settings() | {"chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def tiny_gemma4(tmp_path: Path) -> Callable[..., Path]:
    """tiny_gemma4(layout, multimodal=False, **changes) saves a tiny Gemma 4 with a tokenizer and gives its folder.

    layout: 'E2B', '31B', '26B-A4B' or '12B'. multimodal: as the text part of a model with vision (and audio).
    """

    def make(layout: str, *, multimodal: bool = False, **changes: Any) -> Path:
        import transformers

        kind = "Gemma4Unified" if layout == "12B" else "Gemma4"
        config = getattr(transformers, f"{kind}TextConfig")(**TINY_GEMMA4 | GEMMA4_LAYOUTS[layout] | changes)
        if multimodal:
            vision: dict[str, Any] = {
                "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 16,
            }  # fmt: skip
            if layout == "12B":
                vision = {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64}
            audio = {"audio_embed_dim": 32} if layout == "12B" else None
            whole = getattr(transformers, f"{kind}Config")
            config = whole(text_config=config.to_dict(), vision_config=vision, audio_config=audio)
        folder = tmp_path / f"gemma4-{layout}"
        save_tiny_gemma4(folder, config)
        return folder

    return make


@pytest.fixture
def tiny_gemma4_moe(tiny_gemma4: Callable[..., Path]) -> Callable[..., Path]:
    """tiny_gemma4_moe(**changes): two layers with experts."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return functools.partial(tiny_gemma4, "26B-A4B", **layers)


@pytest.fixture
def tiny_gemma4_assistant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """tiny_gemma4_assistant(unified=False, backbone=64, **changes) saves a tiny drafter with a tokenizer and gives its
    folder; changes are of the text config, but for those named after the drafter's own keys."""
    import transformers

    for config_class in (transformers.Gemma4TextConfig, transformers.Gemma4UnifiedTextConfig):
        shared = config_class.kv_sharing_modes.fget

        def modes(self: Any, shared: Callable[[Any], list[str | None]] = shared) -> list[str | None]:
            # transformers 5.23 looks for layers that own what a drafter's all share, and finds none; and a target that
            # shares nothing among its own layers does not keep keys and values for a drafter.
            n, kinds = self.num_hidden_layers, self.layer_types
            if self.num_kv_shared_layers == n:
                return ["reuse"] * n
            if self.num_kv_shared_layers == 0:
                return ["store" if kind not in kinds[i + 1 :] else None for i, kind in enumerate(kinds)]
            return shared(self)

        monkeypatch.setattr(config_class, "kv_sharing_modes", property(modes))

    def make(*, unified: bool = False, backbone: int = 64, ordered: bool = False, **changes: Any) -> Path:
        own = {
            "hidden_size": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        }  # fmt: skip
        kind = "Gemma4Unified" if unified else "Gemma4"
        text = getattr(transformers, f"{kind}TextConfig")(**TINY_GEMMA4 | own | changes)
        centroids = {"use_ordered_embeddings": True, "num_centroids": 16, "centroid_intermediate_top_k": 4}
        config = getattr(transformers, f"{kind}AssistantConfig")(
            text_config=text, backbone_hidden_size=backbone, **centroids if ordered else {}
        )
        folder = tmp_path / "drafter"
        save_tiny_gemma4(folder, config)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """tiny_towers(family, vision={}, **changes): a tiny multimodal model's folder, not to be changed, and the model."""
    saved: dict[str, tuple[Path, Any]] = {}

    def make(family: str, vision: dict[str, Any] | None = None, **changes: Any) -> tuple[Path, Any]:
        import towers

        key = repr((family, vision, changes))
        if key not in saved:
            folder = tmp_path_factory.mktemp(family)
            config = towers.config_of(family, vision or {}, **changes)
            saved[key] = folder, save_tiny(folder, config, adjust=towers.like_trained)
        return saved[key]

    return make


@pytest.fixture(scope="session")
def packaged_gguf() -> Callable[[str], Path]:
    """packaged_gguf(name): the packaged model's GGUF; skips the test where its package is not installed."""

    def find(name: str) -> Path:
        try:
            return resolve(name)
        except NotFound as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def real_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, packaged_gguf: Callable[[str], Path]
) -> Callable[[str], Path]:
    """real_tokenizer(name): a folder with the packaged model's tokenizer as transformers saves it."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"tokenizer-{name}"
        if not folder.exists():
            from transformers import AutoTokenizer

            gguf = packaged_gguf(name)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        return folder

    return make


def synthesise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    rule: str,
    scales: str,
    group: int,
    dtype: str,
    size: float = 0.02,
) -> np.ndarray:
    """Weights (rows, n) float32 as quantization-aware training stores them: normal ones of standard deviation ``size``,
    rounded to a code times a scale a group, the scale in ``scales`` and the product in ``dtype``: BF16, F16 or F32.

    rule: 'extremum/-8', 'absmax/7', 'absmax/7.5', or 'free scales' that clip or leave room as they like.
    """
    x = (rng.standard_normal(shape, dtype=np.float32) * np.float32(size)).reshape(shape[0], -1, group)
    extreme = np.take_along_axis(x, abs(x).argmax(-1)[..., None], -1)
    divisor = {"extremum/-8": -8.0, "absmax/7": 7.0, "absmax/7.5": 7.5}.get(rule)
    if divisor is None:
        divisor = rng.uniform(5.5, 9.5, extreme.shape)
    step = (extreme if rule == "extremum/-8" else abs(extreme)) / divisor
    step = round_by_definition(step.astype(np.float32), scales)
    codes = np.clip(np.rint(x / step), -8, 7)
    return round_by_definition((codes * step).astype(np.float32).reshape(shape), dtype)


def round_by_definition(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` float32 rounded half to even to ``dtype``, float32 again, by multiples of a power of two in float64:
    nothing of the code under test, and no instruction that flushes subnormals."""
    if dtype == "F32":
        return values
    digits, least_exponent, largest = {"BF16": (8, -125, 2.0**128), "F16": (11, -13, 2.0**16)}[dtype]
    wide = values.astype(np.float64)
    quantum = np.ldexp(1.0, np.maximum(np.frexp(wide)[1], least_exponent) - digits)
    rounded = np.rint(wide / quantum) * quantum
    with np.errstate(over="ignore"):
        return np.where(np.abs(rounded) < largest, rounded, np.copysign(np.inf, wide)).astype(np.float32)


@pytest.fixture(scope="session")
def synthesised() -> Callable[..., np.ndarray]:
    """synthesised(rng, (rows, n), rule=, scales=, group=, dtype=): see ``synthesise``."""
    return synthesise


@pytest.fixture(scope="session")
def rounded() -> Callable[[np.ndarray, str], np.ndarray]:
    """rounded(values, dtype): see ``round_by_definition``."""
    return round_by_definition
