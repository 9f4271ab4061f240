"""A discussion thread as Hacker News' search API gives it (hn.algolia.com/api/v1/items/ID): comments in comments.

Everything in it was written by strangers: HTML becomes plain text, links are kept only where they are http or https,
and nothing is followed.
"""

from __future__ import annotations

import html.parser
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile

_LARGEST = 32 << 20  # bytes of a thread
_MOST = 5000  # comments
_LONGEST = 20_000  # characters of a comment


@dataclass(frozen=True)
class Comment:
    """number: its place in the thread, from 1, by which models name it. id, author: the site's own. links: (text, URL).
    under: the number of the comment that it replies to, None for a first one. replies: how many answer it directly."""

    number: int
    id: int
    author: str
    text: str
    under: int | None
    depth: int
    links: tuple[tuple[str, str], ...] = ()
    replies: int = 0


@dataclass(frozen=True)
class Thread:
    id: int
    title: str
    url: str | None
    comments: tuple[Comment, ...]
    deleted: int = 0
    cut: int = 0  # comments beyond what is read

    def comment(self, number: int) -> Comment | None:
        return self.comments[number - 1] if 1 <= number <= len(self.comments) else None

    def links(self) -> list[tuple[str, str, Comment]]:
        """(text, URL, who gave it first) of each address in the comments, once."""
        seen: dict[str, tuple[str, str, Comment]] = {}
        for comment in self.comments:
            for text, url in comment.links:
                seen.setdefault(url, (text, url, comment))
        return list(seen.values())


def read(path: Path) -> Thread:
    """Raises BadFile."""
    try:
        if path.stat().st_size > _LARGEST:
            raise BadFile("too large for a thread", where=path)
        root = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError):
        raise BadFile("not a thread", where=path, expected="JSON of hn.algolia.com/api/v1/items/ID") from None
    if not isinstance(root, dict) or not isinstance(root.get("children"), list) or type(root.get("id")) is not int:
        raise BadFile("not a thread", where=path, expected="an object with id, title and children")
    comments, deleted, cut = _flat(root)
    if not comments:
        raise BadFile("a thread without comments", where=path)
    url = root.get("url")
    return Thread(
        id=root["id"], title=plain(root.get("title"))[0][:300] or "Untitled", comments=tuple(comments),
        url=url if _is_web(url) else None, deleted=deleted, cut=cut,
    )  # fmt: skip


def _flat(root: dict[str, Any]) -> tuple[list[Comment], int, int]:
    """Comments in reading order. A deleted one is left out, and its replies go to what it replied to."""
    found: list[Comment] = []
    ids: set[int] = set()
    deleted = cut = 0
    todo: list[tuple[Any, int | None, int]] = [(child, None, 0) for child in reversed(_children(root))]
    while todo:
        entry, under, depth = todo.pop()
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or entry["id"] in ids:
            continue
        text, links = plain(entry.get("text"))
        author = entry.get("author")
        inner = under
        if not text or not isinstance(author, str):
            deleted += 1
        elif len(found) >= _MOST:
            cut += 1
        else:
            ids.add(entry["id"])
            name = "".join(c for c in author if c.isprintable())[:60]
            inner = len(found) + 1
            found.append(Comment(inner, entry["id"], name, text, under, depth, links))
        todo.extend((child, inner, depth + 1) for child in reversed(_children(entry)))
    counts = [0] * (len(found) + 1)
    for comment in found:
        counts[comment.under or 0] += 1
    return [Comment(**(vars(comment) | {"replies": counts[comment.number]})) for comment in found], deleted, cut


def _children(entry: dict[str, Any]) -> list[Any]:
    children = entry.get("children")
    return children if isinstance(children, list) else []


def plain(markup: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The text of a comment's HTML, and its links as (text, URL)."""
    if not isinstance(markup, str):
        return "", ()
    reader = _Reader()
    reader.feed(markup[: 4 * _LONGEST])
    reader.close()
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in "".join(reader.parts))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)[:_LONGEST], tuple(reader.links)


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.links: list[tuple[str, str]] = []
        self._url: str | None = None
        self._begun = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "pre", "br"):
            self.parts.append("\n")
        if tag == "a":
            url = dict(attrs).get("href")
            self._url, self._begun = (url if _is_web(url) else None), len(self.parts)

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._url is not None:
            said = "".join(self.parts[self._begun :]).strip() or self._url
            self.links.append((" ".join(said.split())[:200], self._url))
            self._url = None

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _is_web(url: Any) -> bool:
    """An http(s) address without anything that could end an attribute or a Markdown link."""
    if not isinstance(url, str) or len(url) > 2000 or not url.startswith(("http://", "https://")):
        return False
    return all(c.isprintable() and c not in " <>\"'()[]`\\" for c in url)


@dataclass
class Left:
    """What was left out of the debrief, and why: said on the page, so that nothing is missing unseen."""

    reasons: list[str] = field(default_factory=list)

    def out(self, what: str, why: str) -> None:
        self.reasons.append(f"{what}: {why}")
