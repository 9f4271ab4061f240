"""The batch's journeys of examples/: with a model that is scripted to do right or wrong, and with a real one."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from lowbit.errors import BadFile

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES / "debrief"))

import debrief_page  # noqa: E402
import debrief_stages as stages  # noqa: E402
import hn_thread  # noqa: E402

THREAD = EXAMPLES / "data" / "thread.json"
Json = dict[str, Any]


@contextlib.contextmanager
def model(reply: Callable[[Json], Any]) -> Iterator[str]:
    """An OpenAI-compatible server over HTTP whose answers ``reply`` gives for a request's body; its URL."""
    loop, ready, url = asyncio.new_event_loop(), threading.Event(), list[str]()

    async def chat(request: web.Request) -> web.Response:
        said = reply(await request.json())
        message = {"role": "assistant", "content": said if isinstance(said, str) else json.dumps(said)}
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return web.json_response({"object": "chat.completion", "choices": choices, "usage": usage})

    async def go() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(go()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield url[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def main() -> Any:
    spec = importlib.util.spec_from_file_location("debrief_main", EXAMPLES / "debrief" / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def shown(body: Json) -> list[int]:
    """Numbers of the notes in a findings item."""
    return [int(n) for n in re.findall(r"^\[(\d+)\]", body["messages"][1]["content"], re.MULTILINE)]


def good(body: Json) -> Json:
    """What a model that does right says to each kind of item."""
    asked = body["messages"][0]["content"]
    if asked.startswith("You read one comment"):
        terms = ["KV cache", "imatrix", "no such term"]
        return {"gist": "It says something.", "stance": "adds", "mood": "calm", "advice": "", "terms": terms}
    if asked.startswith("You are given notes"):
        first, *_, last = shown(body)
        about, other = word(first), word(last)
        return {
            "insights": [{"insight": f"It is about {about} <b>&</b> {other}.", "comments": [first, last]}],
            "actions": [{"action": f"Do something about {about}.", "comments": [first]}],
            "against": [{"view": f"Nothing about {other} is new.", "comments": [last]}],
        }
    if asked.startswith("You are given the findings"):
        return {"summary": "Classification in a <script>alert(1)</script> of two.", "mood": "A thread of calm people."}
    return {"meaning": "What it really means."}


def word(number: int) -> str:
    """One of a comment's own."""
    return next(w for w in re.findall(r"\b[a-z]{6,}\b", hn_thread.read(THREAD).comments[number - 1].text))


# The thread


def test_the_thread_is_read_whole() -> None:
    thread = hn_thread.read(THREAD)
    assert len(thread.comments) == 52 and thread.deleted == 1
    assert [c.number for c in thread.comments] == list(range(1, 53))
    assert thread.comments[0].author == "marrow_field" and thread.comments[0].replies == 2
    last = thread.comments[-1]
    assert last.author == "codafern" and last.under is None  # its parent was deleted
    assert "&quot;" not in " ".join(c.text for c in thread.comments)
    assert [url for _, url, _ in thread.links()] == [
        "https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/README.md", "https://sqlite.org/wal.html",
        "https://example.org/notes/distil-your-labels", "https://github.com/ggml-org/llama.cpp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"id": 1}', '{"id": 1, "children": []}', "[" * 9999, '{"id": 1, "children": [3, null]}',
             '{"id": "x", "children": [{"id": 1, "text": "a", "author": "b"}]}'],
)  # fmt: skip
def test_what_is_no_thread(tmp_path: Path, text: str) -> None:
    path = tmp_path / "thread.json"
    path.write_text(text)
    with pytest.raises(BadFile):
        hn_thread.read(path)


def test_a_thread_of_strangers(tmp_path: Path) -> None:
    evil = {
        "id": 1, "title": "A<script>", "url": "javascript:alert(1)", "children": [
            {"id": 2, "author": "x\x1b[31m", "text": '<a href="javascript:1">a</a><a href="https://a.example/?q=&quot;&gt;">b'
             '</a><a href="https://ok.example/">ok</a><script>1</script>', "children": [
                {"id": 2, "author": "again", "text": "the same id", "children": []},
                {"id": 3, "author": None, "text": None, "children": "none"}]},
        ],
    }  # fmt: skip
    deep: Json = {"id": 10, "author": "a", "text": "t", "children": []}
    for i in range(11, 300):
        deep = {"id": i, "author": "a", "text": "t", "children": [deep]}
    evil["children"].append(deep)
    path = tmp_path / "thread.json"
    path.write_text(json.dumps(evil))
    thread = hn_thread.read(path)
    assert thread.url is None and [url for _, url, _ in thread.links()] == ["https://ok.example/"]
    assert "\x1b" not in thread.comments[0].author and len(thread.comments) == 291 and thread.deleted == 1


# The page


def test_the_debrief_whole(tmp_path: Path) -> None:
    out = tmp_path / "debrief.html"
    with model(good) as url:
        assert main()([str(THREAD), "-o", str(out), "--endpoint", url]) == 0
    page, text = out.read_text(), out.with_suffix(".md").read_text()
    thread = hn_thread.read(THREAD)
    known = {str(c.id): c.author for c in thread.comments}
    cited = re.findall(r'href="#c(\d+)">([^<&]+)&nbsp;#(\d+)<', page)
    assert len(cited) > 10 and all(known[a] == name and a == b for a, name, b in cited)  # author and id are there
    assert all(f'id="c{a}"' in page for a, _, _ in cited)
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    links = set(re.findall(r'href="(https?://[^"]+)"', page))
    assert links == {url for _, url, _ in thread.links()} | {thread.url}
    assert "<dt>KV cache</dt>" in page and "no such term" not in page
    assert "Left out" not in page
    for title in ("What to do about it", "Mood", "Key insights", "Against the grain", "Glossary"):
        assert f"<h2>{title}</h2>" in page and f"## {title}" in text
    assert r"\<script\>" in text and not re.search(r"(?<!\\)<script", text)


def test_an_invented_comment_is_asked_again_and_then_dropped(tmp_path: Path) -> None:
    """The schema refuses it; a model that will not hear loses that group of findings, which is said."""
    asked: list[Json] = []

    def invents(body: Json) -> Json:
        found = good(body)
        if "insights" in found:
            asked.append(body)
            if len(shown(body)) and shown(body)[0] == 1:
                found["insights"][0]["comments"] = [999]
        return found

    out = tmp_path / "debrief.html"
    with model(invents) as url:
        assert main()([str(THREAD), "-o", str(out), "--endpoint", url]) == 0
    again = [body for body in asked if len(body["messages"]) > 2]
    assert again and "999" in json.dumps(again[0]["messages"])  # it was told what was wrong
    page = out.read_text()
    assert "findings-1: no try gave a valid answer" in page and "999" not in page.replace("#999", "")


def test_an_invented_comment_that_comes_through_is_dropped_and_named() -> None:
    """As from a server whose answers nobody judged."""
    thread, left = hn_thread.read(THREAD), hn_thread.Left()
    answers = {"findings-1": {"insights": [
        {"insight": "They keep both hashes.", "comments": [2, 777]},
        {"insight": "Made up of nothing.", "comments": [777]},
        {"insight": "they KEEP both hashes", "comments": [3]},
        {"insight": "2023-03-22T12:22:14", "comments": [1]},
        {"insight": "Umbrellas float gently upwards.", "comments": [1]},
    ]}}  # fmt: skip
    found = stages.found(thread, {"findings-1": [1, 2, 3]}, answers, "insights", "insight", left)
    assert [(f.text, [c.number for c in f.comments]) for f in found] == [("They keep both hashes.", [2])]
    for said in ("777", "Made up of nothing.", "that is no sentence", "no word in common"):
        assert any(said in reason for reason in left.reasons), said


def test_where_the_model_finds_nothing_the_comments_speak() -> None:
    thread = hn_thread.read(THREAD)
    spoken = stages.quoted(thread, [])
    assert len(spoken) == 8
    for finding in spoken:
        [comment] = finding.comments
        assert finding.text.strip("“”")[:50] in " ".join(comment.text.split())
    enough = [stages.Finding(f"finding {i}", ()) for i in range(3)]
    assert stages.quoted(thread, enough) == enough


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out, calls = tmp_path / "debrief.html", list[Json]()

    def counted(body: Json) -> Json:
        calls.append(body)
        return good(body)

    with model(good) as url:
        assert main()([str(THREAD), "-o", str(out), "--endpoint", url]) == 0
        first = out.read_bytes()
    out.unlink()
    with model(counted) as url:  # all is in the journals: nothing is asked
        assert main()([str(THREAD), "-o", str(out), "--endpoint", url]) == 0
    assert not calls and out.read_bytes().count(b"<li>") == first.count(b"<li>")


def test_markdown_shows_what_was_said() -> None:
    assert debrief_page.escaped("*a* [b](c) <d>\n# f & g") == r"\*a\* \[b\](c) \<d\> \# f &amp; g"
    for evil in ("[x](javascript:1)", "<img src=x>", "# title", "- item", "`code`"):
        said = debrief_page.escaped(evil)
        assert not re.search(r"(?<!\\)[\[<#`]", said), said


# With a real model: whole, if not wise


def test_a_tiny_model_makes_a_whole_debrief(tmp_path: Path) -> None:
    thread = json.loads(THREAD.read_text())
    thread["children"] = thread["children"][6:7]
    thread["children"][0]["children"][0]["children"] = []
    source, out = tmp_path / "thread.json", tmp_path / "debrief.html"
    source.write_text(json.dumps(thread))
    assert len(hn_thread.read(source).comments) == 2
    command = [sys.executable, str(EXAMPLES / "debrief"), str(source), "-o", str(out), "--model", "smollm2-135m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    page, ids = out.read_text(), {str(c.id) for c in hn_thread.read(source).comments}
    assert set(re.findall(r'href="#c(\d+)"', page)) <= ids and page.rstrip().endswith("</html>")
    assert re.search(r'href="#c', page)  # a comment speaks, where the model does not


@pytest.mark.parametrize(
    "folder, source, words, tokens",
    [
        ("reviews", "reviews.csv", ("--schema", "schema.json"), 24),
        ("orders", "mails.jsonl", ("--schema", "order:Order"), 60),
    ],
)  # fmt: skip
def test_labels_and_fields(tmp_path: Path, folder: str, source: str, words: tuple[str, ...], tokens: int) -> None:
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "lowbit", "batch", "run", source, "--template", "prompt.jinja", *words, "--id", "id",
        "--max-tokens", str(tokens), "-o", str(out), "--journal", str(tmp_path / "journal"), "--model", "smollm2-135m",
        "--threads", "1", "--slots", "4",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=EXAMPLES / folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    answered = [line for line in lines if line["error"] is None]
    assert len(answered) >= 0.8 * len(lines)  # the rest failed honestly
    scored = subprocess.run(
        [sys.executable, "score.py", str(out)], cwd=EXAMPLES / folder, capture_output=True, text=True, check=True
    )
    n = len(lines)
    assert re.search(rf"\d+ of {n} right, \d+% to \d+% \(95%\)", scored.stdout), scored.stdout
