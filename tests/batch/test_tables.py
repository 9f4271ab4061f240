"""Rows of tables as requests, in every form that they come in, and what came of them."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from batch_server import BatchServer, answer, value_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import SCHEMA, command, contents, lowbit, read
from pyarrow import parquet

from lowbit import batch
from lowbit.batch import prompts
from lowbit.batch.items import read_place
from lowbit.batch.table import CsvRows, JsonRows, TableOptions
from lowbit.errors import BadFile, BadOption, NotFound

ROWS = [{"id": "a", "text": 'good, "very" good\nindeed', "n": 1}, {"id": "b", "text": "bäd", "n": 2}]
TEMPLATE = "Is it good? {{ text }} ({{ n }})"
ASKED = {row["id"]: f"Is it good? {row['text']} ({row['n']})" for row in ROWS}


def written(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as handle:
            out = csv.DictWriter(handle, ["id", "text", "n"], delimiter="\t" if kind == "tsv" else ",")
            out.writeheader()
            out.writerows(ROWS)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(written(tmp_path, kind.removesuffix(".gz")).read_bytes()))
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_each_form_gives_the_same_requests(kind: str, server: BatchServer, tmp_path: Path) -> None:
    source, out = written(tmp_path, kind), tmp_path / "out.jsonl"
    table = TableOptions(template=TEMPLATE, system="Be brief.", id_column="id")
    batch.run(source, out, endpoint=server.url, table=table)
    assert contents(out) == {custom_id: answer(text) for custom_id, text in ASKED.items()}
    assert all(body["temperature"] == 0 and body["messages"][0]["content"] == "Be brief." for body in server.bodies)
    server.asked.clear()
    batch.run(source, out, endpoint=server.url, table=table)
    assert not server.asked
    with pytest.raises(BadOption, match=r"another template.*--template"):
        batch.run(source, out, endpoint=server.url, table=TableOptions(template="{{ text }}"))


def test_answers_become_columns(server: BatchServer, tmp_path: Path) -> None:
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "status": {"type": "string"}}}
    out = tmp_path / "out.parquet"
    batch.run(written(tmp_path, "csv"), out, endpoint=server.url, table=TableOptions(template=TEMPLATE, schema=schema))
    rows = parquet.read_table(out).to_pylist()
    assert [row["custom_id"] for row in rows] == ["line-2", "line-4"]  # the first row's text has two lines
    for row, asked in zip(rows, ASKED.values(), strict=True):
        value = value_of(asked)
        assert (row["label"], row["score"], row["answer_status"]) == (value["label"], value["score"], None)
        assert row["status"] == 200 and json.loads(row["content"]) == value and row["tries"] == 1
        assert row["prompt_tokens"] > 0 and row["error"] is None and json.loads(row["events"]) == []


def test_failures_in_parquet(server: BatchServer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "status 400"}\n{"text": "fine"}\n{"other": 1}\nnonsense\n')
    ran = batch.run(tmp_path / "rows.jsonl", tmp_path / "out.parquet", endpoint=server.url,
                    table=TableOptions(template="{{ text }}"))  # fmt: skip
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["status"], row["error"]) for row in rows] == [
        (400, "upstream_failed"), (200, None), (None, "invalid_line")
    ]  # fmt: skip
    assert rows[2]["error_message"].startswith("line 3: the template wants what this row has not: 'text'")
    assert ran.errors is not None and len(ran.errors.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "table", "said"),
    [
        ("id,text\n1,x\n", TableOptions(template="{{ txt }}"), "no column txt; found id, text"),
        ("id,text\n1,x\n", TableOptions(template="{{ text }"), "the template cannot be read"),
        ("id,text\n1,x\n", TableOptions(template="{{ text }}", id_column="key"), "no column key"),
        ("a,a\n1,x\n", TableOptions(template="{{ a }}"), "two columns have one name"),
        ("", TableOptions(template="{{ a }}"), "no header"),
        ("a,\n1,2\n", TableOptions(template="{{ a }}"), "no header"),
        ("a\n", TableOptions(template="{{ a }}"), "no row"),
        ("a\n1\n", TableOptions(template="{{ a.__class__.__mro__ }}"), "the template does not fit.*unsafe"),
        ("a\n1\n", None, "a table wants a template"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    text: str, table: Any, said: str, server: BatchServer, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises((BadFile, BadOption), match=said):
        batch.run(tmp_path / "rows.csv", tmp_path / "out.jsonl", endpoint=server.url, table=table)
    assert not server.asked and not (tmp_path / "out.jsonl").exists()


def test_a_pydantic_model_checks_more_than_its_schema(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forms_of_mine.py").write_text(
        "from pydantic import BaseModel, field_validator\n"
        "class Verdict(BaseModel):\n    label: str\n    score: int\n\n"
        "    @field_validator('score')\n    @classmethod\n    def odd(cls, v):\n"
        "        if v % 2 == 0:\n            raise ValueError('score must be odd')\n        return v\n"
    )
    schema, name, check = prompts.schema("forms_of_mine:Verdict")
    assert name == "Verdict" and set(schema["properties"]) == {"label", "score"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"w{i}"}) for i in range(8)))
    table = TableOptions(template="{{ text }}", schema=schema, schema_name=name, check=check)
    batch.run(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", endpoint=server.url, table=table)
    for i, line in enumerate(read(tmp_path / "out.jsonl").values()):
        assert (line["error"] is None) == (value_of(f"w{i}")["score"] % 2 == 1), line
    with pytest.raises(NotFound, match="no such model"):
        prompts.schema("forms_of_mine:Other")
    with pytest.raises(BadOption, match="no Pydantic model"):
        prompts.schema("json:loads")


def test_from_standard_input_to_standard_output(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["run", "-", "-o", "-", "--endpoint", server.url, "--template", TEMPLATE, "--id", "id", "--format", "csv"]
    text = written(tmp_path, "csv").read_bytes()
    done = subprocess.run(command(*words), input=text, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["custom_id"] for line in found] == ["a", "b"]
    assert not list((tmp_path / "cache" / "lowbit" / "batch").iterdir())
    words[3] = str(tmp_path / "out.jsonl")
    for expected in (2, 0):
        server.asked.clear()
        assert subprocess.run(command(*words), input=text, capture_output=True, timeout=60).returncode == 0
        assert len(server.asked) == expected
    other = subprocess.run(command(*words), input=b"id,text,n\nc,x,1\n", capture_output=True, timeout=60, text=False)
    assert other.returncode == 2 and b"another standard input" in other.stderr
    assert lowbit("status", words[3]).stdout.splitlines()[0].endswith("completed, 2 of 2 items (100.0%)")


TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
    all_quoted=st.booleans(),
)
def test_csv_rows_are_found_again_by_their_place(
    rows: list[tuple[str, str]], end: str, all_quoted: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not all_quoted:  # a bare CR is no text where it is not quoted (RFC 4180)
        rows = [(a.replace("\r", " "), b.replace("\r", " ")) for a, b in rows]
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as handle:
        out = csv.writer(handle, lineterminator=end, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
        out.writerow(["a", "b"])
        out.writerows(rows)
    table = CsvRows(path, TableOptions(template="[{{ a }}|{{ b }}]"))
    found = []
    for place in table.places():
        assert place.problem is None
        item = table.item(read_place(path, place.offset, place.length), place.custom_id or "")
        found.append(item.body["messages"][0]["content"])
    assert found == [f"[{a}|{b}]" for a, b in rows]


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_rows_or_said_to_be_none(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bytes") / "rows"
    path.write_bytes(b"a,b\n" + data)
    for table in (
        CsvRows(path, TableOptions(template="{{ row }}")),
        JsonRows(path, TableOptions(template="{{ row }}")),
    ):
        end = 0
        for place in table.places():
            assert end <= place.offset and place.offset + place.length <= 4 + len(data)
            end = place.offset + place.length
            if place.problem is None:
                table.item(read_place(path, place.offset, place.length), place.custom_id or "")


def test_a_job_of_a_table_is_known_without_its_options(server: BatchServer, tmp_path: Path) -> None:
    """Checks and results come later, and ask only for IN."""
    from lowbit.batch.job import Job

    source = written(tmp_path, "csv.gz")
    batch.run(source, endpoint=server.url, table=TableOptions(template=TEMPLATE, schema=SCHEMA, id_column="id"))
    with Job.existing(source) as job:
        place = next(job.journal.query("SELECT offset, length, custom_id FROM items LIMIT 1"))
        item = job.reader.item(read_place(job.reader.path, *place[:2]), place[2])
        assert item.body["messages"][0]["content"] == ASKED["a"] and item.body["response_format"]
    assert batch.write_results(source, tmp_path / "late.parquet") == 0
    assert "score" in parquet.read_table(tmp_path / "late.parquet").column_names
    source.unlink()
    assert batch.status(source).state == "completed"


def test_an_estimate_of_a_table(tmp_path: Path) -> None:
    found = batch.estimate(written(tmp_path, "csv"), table=TableOptions(template=TEMPLATE))
    assert found.items == 2 and not found.bad
