"""llama.cpp with eyes and ears: a text model and its mmproj, in this process, by llama.cpp's mtmd library.

Images are given as pixels and sounds as samples; mtmd scales, encodes and places them itself. Everything runs on the
CPU, where its results are the same on every run.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import BadOption, RuntimeFailed
from lowbit.run import _mtmd_h, _trial
from lowbit.run.llama_cpp import LlamaCpp, check_file


class LlamaCppVision(LlamaCpp):
    """A GGUF model with its mmproj. A context manager; options as LlamaCpp has them.

    mmproj: the file with the towers and the projector. ``flash_attention`` is for the towers too: with it on they
    attend in float16.

    Raises what LlamaCpp raises, and RuntimeFailed where the two files do not belong together.
    """

    def __init__(self, path: str | os.PathLike[str], mmproj: str | os.PathLike[str], **options: Any) -> None:
        self.mmproj = Path(mmproj)
        check_file(self.mmproj)
        if not options.get("trusted"):
            _trial.check(self.mmproj, mmproj=True)
        super().__init__(path, **options)
        try:
            self._towers = self._load_towers(options.get("flash_attention"))
        except BaseException:
            super().close()
            raise
        self._free_towers = weakref.finalize(self, self._lib.mtmd_free, self._towers)
        try:
            self._check_layout()
        except BaseException:
            self.close()
            raise

    def _load_towers(self, flash_attention: bool | None) -> int:
        llama = _mtmd_h.load()
        params = llama.lib.mtmd_context_params_default()
        params.use_gpu = params.print_timings = False
        params.n_threads = self.threads
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        llama.log.take()
        towers = llama.lib.mtmd_init_from_file(os.fsencode(self.mmproj), self._model, params)
        if not towers:
            raise RuntimeFailed(
                "llama.cpp cannot load the mmproj for this model",
                where=self.mmproj, found=llama.log.take() or None,
                hint="Was it made from the same checkpoint? LOWBIT_DEBUG=1 shows llama.cpp's log",
            )  # fmt: skip
        return int(towers)

    def _check_layout(self) -> None:
        """Text alone must tokenize as llama.h tokenizes it: else mtmd_input_text is not laid out as lowbit thinks."""
        for special in (False, True):
            with self._chunks("a b", [], add_special=special) as chunks:
                found = [token for chunk in chunks for token in self._text_tokens(chunk)]
            if found != self.tokenize("a b", add_special=special):
                raise RuntimeFailed("llama.cpp's mtmd tokenizes text differently from llama.h", where=self.mmproj)

    def close(self) -> None:
        """Frees the towers, the context and the model; further calls on this object raise RuntimeFailed."""
        self._free_towers()
        super().close()

    @property
    def sees(self) -> bool:
        """Whether the mmproj has a vision tower."""
        return bool(self._lib.mtmd_support_vision(self._open_towers()))

    @property
    def hears(self) -> bool:
        """Whether the mmproj has an audio tower."""
        return bool(self._lib.mtmd_support_audio(self._open_towers()))

    @property
    def sample_rate(self) -> int:
        """Samples a second that sounds must have; -1 without an audio tower."""
        return int(self._lib.mtmd_get_audio_sample_rate(self._open_towers()))

    def embed(self, media: np.ndarray) -> np.ndarray:
        """What the text model is given for an image, uint8 (height, width, 3), or a sound, float32 (samples,) at
        ``sample_rate``: float32 (tokens, width of the text model)."""
        with self._chunks(self._marker, [media]) as chunks:
            encoded = [self._encode(chunk) for chunk in chunks if self._kind(chunk) in (_mtmd_h.IMAGE, _mtmd_h.AUDIO)]
        return np.concatenate(encoded)

    def logits_with(self, text: str, media: Sequence[np.ndarray]) -> Iterator[tuple[int, list[int], np.ndarray]]:
        """Full-vocabulary logits of a fresh sequence of text and media, for each run of text between media: (position
        of its first token, its token ids, float32 (tokens, n_vocab)).

        text: with one "<__media__>" for each image or sound. mtmd puts the model's own marks around each.
        """
        self.reset()
        with self._chunks(text, media, add_special=True) as chunks:
            for chunk in chunks:
                if self._kind(chunk) in (_mtmd_h.IMAGE, _mtmd_h.AUDIO):
                    self._decode_media(chunk)
                    continue
                ids = self._text_tokens(chunk)
                self._check_room(len(ids))
                step = min(self.ubatch, self._rows)
                for begin in range(0, len(ids), step):
                    part = ids[begin : begin + step]
                    first = self._past
                    yield first, part, self._decode(np.array(part, np.int32), outputs=len(part)).copy()

    # Inside

    @property
    def _marker(self) -> str:
        return str(self._lib.mtmd_default_marker().decode())

    @contextmanager
    def _chunks(self, text: str, media: Sequence[np.ndarray], *, add_special: bool = False) -> Iterator[list[int]]:
        """Handles of the chunks that a text and its media become, valid inside the block."""
        raw, places = text.encode("utf-8"), text.count(self._marker)
        if places != len(media):
            what = f"the text needs one {self._marker} for each image or sound"
            raise BadOption(what, found=f"{places} of them", expected=len(media))
        with ExitStack() as stack:
            bitmaps = (ctypes.c_void_p * max(1, len(media)))()
            for i, item in enumerate(media):
                bitmaps[i] = self._bitmap(item)
                stack.callback(self._lib.mtmd_bitmap_free, bitmaps[i])
            handle = self._lib.mtmd_input_chunks_init()
            stack.callback(self._lib.mtmd_input_chunks_free, handle)
            given = _mtmd_h.InputText(text=raw, text_len=len(raw), add_special=add_special, parse_special=True)
            status = self._lib.mtmd_tokenize(self._open_towers(), handle, ctypes.byref(given), bitmaps, len(media))
            if status:
                raise BadOption("llama.cpp cannot prepare this text, image or sound", where=self.mmproj)
            n = self._lib.mtmd_input_chunks_size(handle)
            yield [self._lib.mtmd_input_chunks_get(handle, i) for i in range(n)]

    def _bitmap(self, media: np.ndarray) -> int:
        """A mtmd_bitmap, which copies the pixels or samples."""
        if media.ndim == 3 and media.shape[2] == 3 and media.dtype == np.uint8 and media.size and self.sees:
            pixels = np.ascontiguousarray(media)
            return int(self._lib.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], pixels.ctypes.data))
        if media.ndim == 1 and media.dtype == np.float32 and media.size and self.hears:
            samples = np.ascontiguousarray(media)
            return int(self._lib.mtmd_bitmap_init_from_audio(len(samples), samples.ctypes.data))
        expected = [
            *(["uint8 (height, width, 3)"] if self.sees else []),
            *(["float32 (samples,)"] if self.hears else []),
        ]
        raise BadOption(
            "not what this mmproj takes",
            where=self.mmproj, found=f"{media.dtype} {media.shape}", expected=" or ".join(expected),
        )  # fmt: skip

    def _kind(self, chunk: int) -> int:
        return int(self._lib.mtmd_input_chunk_get_type(chunk))

    def _text_tokens(self, chunk: int) -> list[int]:
        n = ctypes.c_size_t()
        tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
        return tokens[: n.value] if tokens else []

    def _encode(self, chunk: int) -> np.ndarray:
        """An image's or sound's embeddings, float32 (tokens, width)."""
        towers = self._open_towers()
        self._llama.log.take()
        if self._lib.mtmd_encode_chunk(towers, chunk):
            raise RuntimeFailed("llama.cpp could not encode", where=self.mmproj, found=self._llama.log.take() or None)
        shape = (self._lib.mtmd_input_chunk_get_n_tokens(chunk), self._lib.llama_model_n_embd_inp(self._model))
        return np.ctypeslib.as_array(self._lib.mtmd_get_output_embd(towers), shape=shape).copy()

    def _decode_media(self, chunk: int) -> None:
        """Encodes an image or sound and appends it to the sequence."""
        values = self._encode(chunk)
        self._check_room(len(values))
        if len(values) > self.ubatch and self._lib.mtmd_decode_use_non_causal(self._towers, chunk):
            raise BadOption(
                "an image whose tokens attend to each other is decoded at once",
                where=self.mmproj, found=f"{len(values)} tokens", expected=f"at most ubatch = {self.ubatch}",
                hint="Open the model with a larger ubatch",
            )  # fmt: skip
        past = ctypes.c_int32()
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        status = self._lib.mtmd_helper_decode_image_chunk(
            self._towers,
            self._open_context(),
            chunk,
            pointer,
            self._past,
            0,
            self.ubatch,
            ctypes.byref(past),
            None,
            None,
        )
        if status:
            raise RuntimeFailed("llama.cpp could not decode", where=self.path, found=self._llama.log.take() or None)
        self._past = past.value

    def _check_room(self, n: int) -> None:
        if self._past + n > self.context:
            raise BadOption(
                "the sequence does not fit the context", where=self.path, found=f"{self._past + n} tokens or more",
                expected=f"at most {self.context}", hint="Open the model with a larger context",
            )  # fmt: skip

    def _open_towers(self) -> int:
        self._open_model()
        return self._towers
