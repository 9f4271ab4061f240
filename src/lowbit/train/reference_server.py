"""A reference in another process of this machine: it holds the model, and trainings ask it over loopback HTTP.

``lowbit reference MODEL --port P`` answers, ``lowbit train MODEL --reference http://127.0.0.1:P`` asks.

    GET /       what it is: JSON with "format", "model" {"name", "sha256"}, "n_vocab", "precision"
    POST /records?model=SHA256&length=T&first=I&seed=S
                int32 token ids (n, T), little-endian, in the body: sequences I, I + 1, ... of the caller's data. The
                answer is of each position its record (``lowbit.compact``)

It listens to this machine alone. Web pages cannot ask: a browser sends no body of this content type without asking
whether it may, which is not answered.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import numpy as np
import torch

from lowbit import compact
from lowbit.errors import BadFile, BadOption, CannotWrite, RuntimeFailed
from lowbit.train.forms import Compact
from lowbit.train.loss import softcap
from lowbit.train.reference import OwnReference

FORMAT = "lowbit-reference/1"
CONTENT = "application/x-lowbit-tokens"
_HOST = "127.0.0.1"
_LARGEST_BODY = 16 << 20  # 4 million tokens
_PATIENCE = 3600.0  # seconds for a batch: a large model on a few cores takes minutes


class Asked:
    """What a server answers with. about: what GET / says. model: in evaluation mode."""

    def __init__(self, model: Any, dtype: torch.dtype, about: dict[str, Any]) -> None:
        self.model, self.dtype, self.about = model, dtype, {"format": FORMAT, **about}
        self.head = model.get_output_embeddings().weight.detach().to(dtype)
        self._one = threading.Lock()  # a batch at a time: each takes all cores

    def records(self, tokens: np.ndarray, first: int, seed: int) -> bytes:
        form = Compact(self.about["n_vocab"], seed, softcap(self.model))
        own = OwnReference(self.model, self.dtype, form, self.head)
        with self._one:
            return own(tokens, first)["records"].numpy().tobytes()


def listen(asked: Asked, port: int, ready: Callable[[str], None]) -> None:
    """Answers until the process is interrupted. ready: called with the URL. Raises CannotWrite (the port is taken)."""
    try:
        server = ThreadingHTTPServer((_HOST, port), type("Handler", (_Handler,), {"asked": asked}))
    except OSError as error:
        hint = "Another --port may be free; --port 0 takes one that is"
        raise CannotWrite("cannot listen there", where=f"{_HOST}:{port}", found=error.strerror, hint=hint) from None
    server.daemon_threads = True
    with server:
        ready(f"http://{_HOST}:{server.server_address[1]}")
        server.serve_forever(poll_interval=0.2)


class _Handler(BaseHTTPRequestHandler):
    asked: Asked
    protocol_version = "HTTP/1.1"
    timeout = 600.0
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path != "/":
            self._refuse(404, "not here")
            return
        self._answer(200, "application/json", json.dumps(self.asked.about).encode())

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        length = self.headers.get("Content-Length", "")
        if path != "/records" or self.headers.get("Content-Type") != CONTENT:
            self._refuse(404, "not here")
        elif not length.isdecimal() or not 0 < int(length) <= _LARGEST_BODY:
            self._refuse(413, f"a body of 1 to {_LARGEST_BODY} bytes is expected")
        else:
            self._records(dict(urllib.parse.parse_qsl(query)), self.rfile.read(int(length)))

    def _records(self, given: dict[str, str], body: bytes) -> None:
        about = self.asked.about
        if given.get("model") != about["model"]["sha256"]:
            self._refuse(409, f"this is {about['model']['name']} ({about['model']['sha256']})")
            return
        numbers = [
            int(text) if text.isdecimal() else -1 for text in (given.get(n, "") for n in ("length", "first", "seed"))
        ]
        length, first, seed = numbers
        if length < 1 or first < 0 or seed < 0 or len(body) % (4 * length):
            self._refuse(400, "length, first and seed are numbers, and the body whole sequences")
            return
        tokens = np.frombuffer(body, "<i4").reshape(-1, length)
        if tokens.min() < 0 or tokens.max() >= about["n_vocab"]:
            self._refuse(400, f"token ids are 0 to {about['n_vocab'] - 1}")
            return
        self._answer(200, "application/octet-stream", self.asked.records(tokens, first, seed))

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # a body that was not read is still to come
        self._answer(status, "text/plain; charset=utf-8", why.encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a training says what it asks."""


class RemoteReference:
    """A reference that another process holds, to be asked as ``OwnReference`` is. Raises RuntimeFailed, BadFile."""

    def __init__(self, url: str, form: Compact | None = None) -> None:
        self.url, self.form = url, form
        try:
            self._client = httpx2.Client(base_url=url, timeout=_PATIENCE, trust_env=False)
            answer = self._sent("GET", "/")
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError) as error:
            raise BadOption("not the URL of a reference", where=url, found=str(error)) from None
        try:
            self.about = dict(answer.json())
            self.model, n_vocab = dict(self.about["model"]), self.about["n_vocab"]
            if self.about["format"] != FORMAT or type(n_vocab) is not int or not isinstance(self.model["sha256"], str):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            hint = "lowbit reference MODEL --port P starts one"
            raise BadFile(
                "no lowbit reference answers there", where=url, found=repr(answer.text[:40]), hint=hint
            ) from None

    def check_belongs(self, *, model: str, n_vocab: int) -> None:
        """Raises BadOption where it is another model."""
        if (self.model["sha256"], self.about["n_vocab"]) != (model, n_vocab):
            found, expected = f"{self.model.get('name')} ({self.model['sha256']})", f"the model's own ({model})"
            raise BadOption("the reference is of another model", where=self.url, found=found, expected=expected)

    def __call__(self, sequences: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        assert self.form is not None
        n, length = sequences.shape
        asked = {"model": self.model["sha256"], "length": length, "first": first, "seed": self.form.seed}
        answer = self._sent("POST", "/records", params=asked, content=sequences.astype("<i4").tobytes())
        size = self.form.layout.dtype.itemsize
        if len(answer.content) != n * length * size:
            found = f"{len(answer.content)} bytes"
            raise RuntimeFailed("the reference answers with another number of records", where=self.url, found=found)
        if wrong := compact.wrong(self.form.layout, np.frombuffer(answer.content, self.form.layout.dtype)):
            raise RuntimeFailed("the reference answers with a record that cannot be", where=self.url, found=wrong)
        return {"records": torch.frombuffer(bytearray(answer.content), dtype=torch.uint8).reshape(n, length, size)}

    def _sent(self, method: str, path: str, **more: Any) -> httpx2.Response:
        hint = "Start it again (lowbit reference MODEL --port P); the same command goes on from here"
        try:
            answer = self._client.request(method, path, headers={"Content-Type": CONTENT}, **more)
        except httpx2.TransportError as error:
            if isinstance(error, httpx2.UnsupportedProtocol):
                raise
            found = str(error) or type(error).__name__
            raise RuntimeFailed("the reference does not answer", where=self.url, found=found, hint=hint) from None
        if answer.status_code != 200:
            found = f"{answer.status_code}: {answer.text[:100]}"
            raise RuntimeFailed("the reference refuses", where=self.url, found=found, hint=hint)
        return answer
