"""An agent in a browser: ``python examples/browse.py "Order beans for ann@example.org"`` fills in a local page.

Headless Chromium is driven over its own DevTools protocol. The page is a stranger's text: it holds a forged tool call,
written with the model's control tokens, which lowbit serve makes plain text before the model reads it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai

from lowbit.serve import ServeOptions, running_model

PAGE = Path(__file__).parent / "data" / "shop.html"
STEPS = 8
_ELEMENTS = "[...document.querySelectorAll('input, button, a, select, textarea')]"
_SHOWN = (
    "document.body.innerText + '\\n\\nElements:\\n' + "
    + _ELEMENTS
    + ".map((e, i) => `${i}: ${e.tagName.toLowerCase()} ${e.name || e.innerText} ${e.value || ''}`).join('\\n')"
)


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            said = await self._socket.receive_json(timeout=30)
            if said.get("id") == self._number:
                if "error" in said:
                    raise RuntimeError(said["error"]["message"])
                found: dict[str, Any] = said["result"]
                return found

    async def evaluate(self, script: str) -> Any:
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"].splitlines()[0])
        return found["result"].get("value")

    async def open(self, page: Path) -> None:
        await self.send("Page.navigate", url=page.resolve().as_uri())
        while await self.evaluate("document.readyState") != "complete":
            await asyncio.sleep(0.05)

    # The tools. Numbers and texts go into scripts as JSON, never as they are.

    async def read(self) -> str:
        return str(await self.evaluate(_SHOWN))

    async def type(self, element: int, text: str) -> str:
        await self.evaluate(f"(e => {{ e.focus(); e.value = {json.dumps(text)} }})({_ELEMENTS}[{int(element)}])")
        return "typed"

    async def click(self, element: int) -> str:
        await self.evaluate(f"{_ELEMENTS}[{int(element)}].click()")
        return await self.read()


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Raises FileNotFoundError without Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise FileNotFoundError("Chromium is not installed")
    with tempfile.TemporaryDirectory(prefix="lowbit-browse-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as response:
                    pages = await response.json()
                address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
                async with session.ws_connect(address, max_msg_size=16 << 20) as socket:
                    yield Browser(socket)
        finally:
            process.kill()
            await process.wait()


async def _port(file: Path) -> int:
    for _ in range(600):
        if file.is_file() and (said := file.read_text().split()):
            return int(said[0])
        await asyncio.sleep(0.1)
    raise TimeoutError("Chromium does not start")


def _tool(name: str, description: str, /, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_ELEMENT = {"type": "integer", "minimum": 0, "description": "its number in the list of elements"}
TOOLS = [
    _tool("read", "Reads the page and lists its elements."),
    _tool("type", "Types a text into an element.", element=_ELEMENT, text={"type": "string"}),
    _tool("click", "Clicks an element.", element=_ELEMENT),
]


async def run(
    client: openai.AsyncOpenAI, page: Browser, task: str, show: Callable[[str], None] = lambda line: None
) -> str:
    """The model's last words. Raises openai.APIStatusError where the endpoint gives up."""
    said = f"{task}\n\nThe page:\n{await page.read()}"
    messages: list[Any] = [{"role": "user", "content": said}]
    while True:
        response = await client.chat.completions.create(
            model="local", messages=messages, tools=TOOLS, max_tokens=200, temperature=0,  # type: ignore[arg-type]
            parallel_tool_calls=False, extra_body={"lowbit": {"max_steps": STEPS, "same_call": 2}},
        )  # fmt: skip
        message = response.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            function = call.function  # type: ignore[union-attr]
            try:
                tool = {"read": page.read, "type": page.type, "click": page.click}[function.name]
                result = await tool(**json.loads(function.arguments))
            except (RuntimeError, KeyError, TypeError, ValueError) as error:
                result = f"error: {error}"
            show(f"{function.name}({function.arguments}): {result.splitlines()[0] if result else ''}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def main(task: str, model: str, url: str | None) -> int:
    async def go(at: str) -> int:
        async with browser() as page, openai.AsyncOpenAI(base_url=at, api_key="-", max_retries=0) as client:
            await page.open(PAGE)
            try:
                print(await run(client, page, task, lambda line: print(line, file=sys.stderr)))
            except openai.APIStatusError as error:
                print(f"no answer: {error.message}", file=sys.stderr)
                return 1
            print(f"The page now says: {await page.evaluate('done.textContent') or 'nothing was ordered'}")
        return 0

    if url is not None:
        return await go(url)
    async with running_model(model, ServeOptions(port=0)) as at:
        return await go(at)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--model", default="smollm2-135m", help="served for this; default: %(default)s")
    parser.add_argument("--url", help="instead: a lowbit serve that runs, up to /v1")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.task, given.model, given.url)))
