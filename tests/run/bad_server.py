"""A small HTTP server on this machine that answers as it is told, badly for the most part."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, Any], None]
MODELS = {"object": "list", "data": [{"id": "a-model", "object": "model"}]}


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(body)


def events(handler: BaseHTTPRequestHandler, *lines: str, pause: float = 0.0) -> None:
    """Lines of a stream, and then the connection ends."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for line in lines:
            handler.wfile.write(f"data: {line}\n\n".encode())
            handler.wfile.flush()
            time.sleep(pause)
    handler.close_connection = True


@contextlib.contextmanager
def serving(answers: dict[str, Answer | Any]) -> Iterator[str]:
    """The address of a server with these answers by path; what is no function is sent as JSON. /v1/models works unless
    it is among them."""
    known = {"/v1/models": MODELS, **answers}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # headers and body in one packet

        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            answer = known.get(self.path)
            if answer is None:
                send(self, b'{"error": {"message": "no such path"}}', 404)
            elif callable(answer):
                answer(self, json.loads(raw) if raw else None)
            else:
                send(self, json.dumps(answer).encode())

        do_GET = do_POST = respond

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that left
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
