"""A discussion thread to a debrief: ``python examples/debrief examples/data/thread.json -o debrief.html``.

Four batches, one after the other, each through ``lowbit batch``: kill it at any moment, and the same command goes on.
A tiny model does all of it badly; a larger one behind --endpoint does it well. Either way no comment is named that is
not in the thread, and no link that does not stand in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import debrief_page
import debrief_stages as stages
import hn_thread
from hn_thread import Left, Thread

from lowbit import batch
from lowbit.errors import LowbitError
from lowbit.files import replacing

Json = dict[str, Any]


class Unfinished(Exception):
    """A batch was stopped; the same command goes on."""


class Stage:
    """Runs items as a batch in a folder of its own, and gives the answers that came of it."""

    def __init__(self, folder: Path, left: Left, **how: Any) -> None:
        self.folder, self.left, self.how = folder, left, how

    def answers(self, name: str, items: Iterable[Json]) -> dict[str, Json]:
        """By custom_id, in the order asked. What has no valid answer is left out, and said. Raises LowbitError."""
        items = list(items)
        if not items:
            return {}
        source, out = self.folder / f"{name}.jsonl", self.folder / f"{name}.out.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        if not source.is_file() or source.read_text(encoding="utf-8") != text:
            with replacing(source) as partial:
                partial.write_text(text, encoding="utf-8")
        ran = batch.run(source, out, **self.how)
        if ran.out is None:
            raise Unfinished(ran)
        found = dict(self._read(out))
        for item in items:
            if item["custom_id"] not in found:
                self.left.out(item["custom_id"], "no try gave a valid answer")
        return {item["custom_id"]: found[item["custom_id"]] for item in items if item["custom_id"] in found}

    @staticmethod
    def _read(out: Path) -> Iterable[tuple[str, Json]]:
        with open(out, encoding="utf-8") as lines:
            for line in lines:
                result = json.loads(line)
                response = result.get("response") or {}
                if response.get("status_code") == 200:
                    yield result["custom_id"], json.loads(response["body"]["choices"][0]["message"]["content"])


def debrief(thread: Thread, stage: Stage, model: str) -> debrief_page.Debrief:
    """Raises LowbitError, Unfinished."""
    left = stage.left
    noted = {int(key.rpartition("-")[2]): note for key, note in stage.answers("notes", stages.notes(thread)).items()}
    answers, shown = stage.answers("findings", stages.findings(thread, noted)), stages.groups(noted)
    insights = stages.found(thread, shown, answers, "insights", "insight", left)
    actions = stages.found(thread, shown, answers, "actions", "action", left)
    against = stages.found(thread, shown, answers, "against", "view", left)
    whole = stage.answers("whole", stages.whole(thread, noted, insights, against))
    terms = stages.terms(thread, noted)
    explained = stage.answers("glossary", stages.glossary(terms))
    said = dict(whole.get("summary") or {"summary": "", "mood": ""})
    for name in ("summary", "mood"):
        why = "the model gave none" if not said[name] else stages.unfit(said[name], thread.comments)
        if why:
            left.out(f"the {name} “{said[name][:60]}”", why)
            said[name] = f"The model's {name} was left out: {why}."
    moods = Counter(note["mood"] for note in noted.values()).most_common(4)
    return debrief_page.Debrief(
        thread=thread,
        summary=said["summary"],
        mood=said["mood"],
        shares=[(name, round(100 * count / len(noted))) for name, count in moods],
        insights=stages.chosen(stages.quoted(thread, insights), whole.get("choose")),
        actions=actions[:8],
        against=against[:5],
        meanings=[
            (term, explained[f"term-{i}"]["meaning"], comment)
            for i, (term, comment) in enumerate(terms, 1)
            if f"term-{i}" in explained and stages.is_sentence(explained[f"term-{i}"]["meaning"])
        ],
        left=left,
        model=model,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("thread", type=Path, metavar="THREAD.json", help="of hn.algolia.com/api/v1/items/ID")
    parser.add_argument("-o", "--out", type=Path, default=Path("debrief.html"), help="default: %(default)s; "
                        "the Markdown is written beside it")  # fmt: skip
    parser.add_argument("--model", help="a GGUF, a run folder, a packaged name; default: smollm2-135m")
    parser.add_argument("--endpoint", help="instead: a server that runs, up to /v1")
    parser.add_argument("--endpoint-model", help="the model's name there")
    parser.add_argument("--work", type=Path, help="where the batches are kept; default: beside OUT")
    given = parser.parse_args(argv)
    try:
        thread = hn_thread.read(given.thread)
        digest = hashlib.sha256(given.thread.read_bytes()).hexdigest()[:8]
        folder = given.work or given.out.with_name(f"{given.out.stem}-{digest}.work")
        how = {"endpoint": given.endpoint, "endpoint_model": given.endpoint_model}
        if given.endpoint is None:
            how = {"model": given.model or "smollm2-135m"}
        left = Left()
        if thread.cut:
            left.out(f"{thread.cut} comments", f"only the first {len(thread.comments)} are read")
        found = debrief(
            thread, Stage(folder, left, **how), given.endpoint_model or given.endpoint or how["model"] or ""
        )
        for path, text in (
            (given.out, debrief_page.html(found)),
            (given.out.with_suffix(".md"), debrief_page.markdown(found)),
        ):
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
    except Unfinished:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except LowbitError as error:
        print(f"debrief: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: {len(found.insights)} insights on {len(found.cited())} of {len(thread.comments)} comments, "
          f"{len(left.reasons)} left out")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
