"""The debrief's questions to the model: each stage is a file of small items, and each item's answer follows a schema.

1. notes:     each comment by itself: what it says, how, whether it gives advice, its technical terms
2. findings:  a dozen notes at a time: insights, advice and views against the grain, with the comments they rest on
3. whole:     the summary and the mood, and which insights are worth a reader's time
4. glossary:  each term by itself

A comment is named by its number in the thread. The schema of a findings item lists the numbers that it was shown, so
that an invented one is refused and asked again; what still names one is dropped here, and said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hn_thread import Comment, Left, Thread

Json = dict[str, Any]
STANCES = ("agrees", "adds", "asks", "disagrees")
MOODS = ("calm", "curious", "amused", "enthusiastic", "worried", "annoyed")
_GROUP = 12  # notes in a findings item
_SHOWN = 1500  # characters of a comment
_TERMS, _INSIGHTS = 10, 8
_STEM, _LONGEST_WORD = 5, 40  # letters
_QUOTE = 60  # characters of a quote at least, in whole sentences
_LEAST = 3  # insights, before comments speak for themselves
_WORD = re.compile(r"\w+", re.UNICODE)


@dataclass(frozen=True)
class Finding:
    """A sentence and the comments that it rests on, which are there."""

    text: str
    comments: tuple[Comment, ...]

    @property
    def weight(self) -> int:
        """How much of the thread is behind it: the comments, and what was replied to them."""
        return sum(1 + comment.replies for comment in self.comments)


def item(custom_id: str, system: str, user: str, properties: Json, *, most: int) -> Json:
    """A line of Batch JSONL whose answer is an object with these properties, all of them."""
    schema = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    body = {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "max_tokens": most,
        "temperature": 0,
    }
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _text(most: int) -> Json:
    return {"type": "string", "minLength": 1, "maxLength": most}


# 1. Notes

_NOTE = (
    "You read one comment of a discussion and take a note of it. gist: what the comment says, in one plain sentence. "
    "stance: whether it agrees with what it replies to, adds to it, asks, or disagrees. mood: its tone. advice: what "
    "it tells others to do, or an empty text. terms: technical terms in it that a newcomer would not know, as they are "
    "written there."
)


def notes(thread: Thread) -> Iterator[Json]:
    for comment in thread.comments:
        under = thread.comment(comment.under) if comment.under else None
        before = f"In reply to {under.author}: {under.text[:200]}\n\n" if under else ""
        user = f"Discussion: {thread.title}\n\n{before}Comment by {comment.author}:\n{comment.text[:_SHOWN]}"
        properties = {
            "gist": _text(240), "stance": {"enum": list(STANCES)}, "mood": {"enum": list(MOODS)},
            "advice": {"type": "string", "maxLength": 200},
            "terms": {"type": "array", "maxItems": 3, "items": _text(40)},
        }  # fmt: skip
        yield item(f"note-{comment.number}", _NOTE, user, properties, most=220)


# 2. Findings

_FIND = (
    "You are given notes of a discussion, each with its number in brackets. insights: what somebody who was not there "
    "should know, each in one sentence. actions: what a reader could do about it, each beginning with a verb. against: "
    "views that most of the others do not share. Under comments, name the numbers of the notes that it rests on, and "
    "no other numbers. Leave a list empty rather than guess."
)


def groups(noted: dict[int, Json]) -> dict[str, list[int]]:
    """Which comments each findings item is shown, by its custom_id: neighbours, since a reply is understood beside what
    it replies to."""
    numbers = sorted(noted)
    return {f"findings-{i // _GROUP + 1}": numbers[i : i + _GROUP] for i in range(0, len(numbers), _GROUP)}


def findings(thread: Thread, noted: dict[int, Json]) -> Iterator[Json]:
    for custom_id, group in groups(noted).items():
        lines = [_noted(thread.comments[number - 1], noted[number]) for number in group]
        rests = {"type": "array", "minItems": 1, "maxItems": 4, "items": {"enum": group}}

        def listed(name: str, most: int, rests: Json = rests) -> Json:
            inner = {
                "type": "object", "properties": {name: _text(200), "comments": rests}, "required": [name, "comments"],
                "additionalProperties": False,
            }  # fmt: skip
            return {"type": "array", "maxItems": most, "items": inner}

        properties = {
            "insights": listed("insight", 3), "actions": listed("action", 2), "against": listed("view", 2)
        }  # fmt: skip
        user = f"Discussion: {thread.title}\n\n" + "\n".join(lines)
        yield item(custom_id, _FIND, user, properties, most=800)


def _noted(comment: Comment, note: Json) -> str:
    reply = f" to [{comment.under}]" if comment.under else ""
    return f"[{comment.number}] {comment.author}{reply} ({note['stance']}): {note['gist']}"


def found(
    thread: Thread, shown: dict[str, list[int]], answers: dict[str, Json], kind: str, name: str, left: Left
) -> list[Finding]:
    """All findings of a kind, the weightiest first. shown: what groups() gave. An invented comment is dropped and said;
    so is a finding that rests on no other."""
    result: list[Finding] = []
    seen: set[str] = set()
    for custom_id, answer in answers.items():
        for entry in answer.get(kind) or []:
            text = " ".join(str(entry[name]).split())
            numbers = list(dict.fromkeys(entry["comments"]))
            for number in numbers:
                if number not in shown[custom_id]:
                    left.out(f"comment [{number}]", f"named for “{text[:60]}”, and not among those that were shown")
            comments = tuple(c for n in numbers if n in shown[custom_id] and (c := thread.comment(n)))
            key = " ".join(_WORD.findall(text.casefold()))
            if not comments:
                left.out(f"“{text[:60]}”", "it rests on no comment that is there")
            elif why := unfit(text, comments):
                left.out(f"“{text[:60]}”", why)
            elif key and key not in seen:
                seen.add(key)
                result.append(Finding(text, comments))
    return sorted(result, key=lambda finding: -finding.weight)


def unfit(text: str, comments: Sequence[Comment]) -> str:
    """Why a sentence of the model's cannot be about these comments, "" where it can. It takes little: a longer word in
    common. What a tiny model makes up of digits, or of nothing, does not have that."""
    if not is_sentence(text):
        return "that is no sentence"
    said = {word[:_STEM] for comment in comments for word in _long_words(comment.text)}
    return "" if said & {word[:_STEM] for word in _long_words(text)} else "it has no word in common with what it names"


def is_sentence(text: str) -> bool:
    words = text.split()
    return len(words) >= 3 and all(len(word) <= _LONGEST_WORD or "://" in word for word in words)


def _long_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.casefold()) if len(word) >= _STEM and not word.isdigit()]


# 3. The whole

_WHOLE = (
    "You are given the findings of a discussion. summary: what was discussed and what came of it, in three to five "
    "plain sentences for somebody who was not there. mood: how the discussion went, in one sentence."
)
_CHOOSE = (
    "You are given numbered insights from a discussion. keep: the numbers of those most worth knowing, the best first. "
    "Leave out what only repeats another one or says nothing."
)


def whole(
    thread: Thread, noted: dict[int, Json], insights: Sequence[Finding], against: Sequence[Finding]
) -> Iterator[Json]:
    lines = [f"- {finding.text}" for finding in insights[:16]]
    lines += [f"- Against the others: {finding.text}" for finding in against[:4]]
    if not lines:  # the findings all failed: the comments that were answered most
        first = sorted(noted, key=lambda n: -thread.comments[n - 1].replies)[:12]
        lines = [f"- {noted[n]['gist']}" for n in first]
    stances = Counter(note["stance"] for note in noted.values())
    moods = Counter(note["mood"] for note in noted.values())
    counts = ", ".join(f"{count} {name}" for name, count in (stances + moods).most_common())
    user = f"Discussion: {thread.title}\n{len(thread.comments)} comments: {counts}\n\n" + "\n".join(lines)
    yield item("summary", _WHOLE, user, {"summary": _text(700), "mood": _text(200)}, most=320)
    if len(insights) > _INSIGHTS:
        listed = "\n".join(f"{i}. {finding.text}" for i, finding in enumerate(insights, 1))
        numbers = {"enum": list(range(1, len(insights) + 1))}
        keep = {"type": "array", "minItems": 1, "maxItems": _INSIGHTS, "items": numbers}
        yield item("choose", _CHOOSE, f"Discussion: {thread.title}\n\n{listed}", {"keep": keep}, most=80)


def quoted(thread: Thread, insights: Sequence[Finding]) -> list[Finding]:
    """The insights; where the model found hardly any, also how the comments begin that were answered most."""
    found = list(insights)
    for comment in sorted(thread.comments, key=lambda c: -c.replies)[: max(0, _LEAST - len(found)) and _INSIGHTS]:
        begin = ""
        for sentence in re.split(r"(?<=[.!?])\s", comment.text):
            begin = f"{begin} {sentence}".strip()
            if len(begin) >= _QUOTE:
                break
        found.append(Finding(f"“{begin[:240]}”", (comment,)))
    return found


def chosen(insights: Sequence[Finding], answer: Json | None) -> list[Finding]:
    """What the model chose, filled up with the weightiest where it chose few."""
    kept = [insights[n - 1] for n in dict.fromkeys((answer or {}).get("keep") or []) if 1 <= n <= len(insights)]
    return [*kept, *(finding for finding in insights if finding not in kept)][:_INSIGHTS]


# 4. Glossary

_EXPLAIN = (
    "You explain a technical term to somebody new to it. meaning: one plain sentence without other technical terms. "
    "The sentence in which it was used shows which meaning is asked for."
)


def terms(thread: Thread, noted: dict[int, Json]) -> list[tuple[str, Comment]]:
    """Terms that really stand in the comment they were noted of, and where each was used first; the most used first."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[str, Comment]] = {}
    for number, note in sorted(noted.items()):
        comment = thread.comments[number - 1]
        for term in note["terms"]:
            term = " ".join(str(term).split()).strip(".,;:!?\"'()")
            key = term.casefold()
            # A name of the site's, or a plain word that a small model took for a term, explains nothing.
            if not _stands_in(term, comment.text) or not (
                any(c.isupper() or c.isdigit() or c in "-_" for c in term) or " " in term
            ):
                continue
            counts[key] += 1
            first.setdefault(key, (term, comment))
    return [first[key] for key, _ in counts.most_common(_TERMS)]


def _stands_in(term: str, text: str) -> bool:
    return len(term) > 2 and re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text, re.IGNORECASE) is not None


def glossary(listed: Sequence[tuple[str, Comment]]) -> Iterator[Json]:
    for i, (term, comment) in enumerate(listed, 1):
        at = comment.text.casefold().find(term.casefold())
        used = comment.text[max(0, at - 160) : at + 200]
        user = f"Term: {term}\nUsed in: … {used} …"
        yield item(f"term-{i}", _EXPLAIN, user, {"meaning": _text(240)}, most=100)
