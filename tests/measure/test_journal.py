"""Finished cells survive whatever happens to the process, and nothing else is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.errors import CannotWrite
from lowbit.measure.budget import Budget
from lowbit.measure.journal import Journal, pack, unpack

WHAT = {"files": ["a", "b"], "options": {"seed": 0}}


def filled(path: Path, cells: int = 3) -> bytes:
    with Journal(path, WHAT) as journal:
        for i in range(cells):
            journal.cell(f"kv/{i}", lambda i=i: {"value": i})  # type: ignore[misc]
    return path.read_bytes()


def never() -> Any:
    raise AssertionError("measured again")


def test_finished_cells_are_not_computed_again(tmp_path: Path) -> None:
    filled(tmp_path / "out.json.work")
    with Journal(tmp_path / "out.json.work", WHAT) as journal:
        assert [journal.cell(f"kv/{i}", never)["value"] for i in range(3)] == [0, 1, 2]
        assert not journal.has("kv/3")
        journal.finish()
    assert not (tmp_path / "out.json.work").exists()


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "work"
    whole = filled(path)
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) - len(lines[-1]), len(whole), 7):
        path.write_bytes(whole[:cut])
        with Journal(path, WHAT) as journal:
            assert journal.has("kv/1") and not journal.has("kv/2")
            assert journal.cell("kv/2", lambda: {"value": 2}) == {"value": 2}
        with Journal(path, WHAT) as journal:
            assert journal.cell("kv/2", never) == {"value": 2}


def test_another_measurement_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    with Journal(tmp_path / "work", {**WHAT, "files": ["a", "c"]}) as journal:
        assert not journal.has("kv/0")
    (tmp_path / "work").write_bytes(b"somebody's notes\n")
    with Journal(tmp_path / "work", WHAT) as journal:
        assert journal.cell("kv/0", lambda: 5) == 5


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    with Journal(tmp_path / "work", WHAT), pytest.raises(CannotWrite, match="another process"):
        Journal(tmp_path / "work", WHAT)
    with pytest.raises(CannotWrite):
        Journal(tmp_path, WHAT)


def test_without_a_path_cells_are_held_in_memory() -> None:
    with Journal(None, WHAT) as journal:
        assert journal.cell("a", lambda: 1) == journal.cell("a", never) == 1
        journal.finish()


def test_a_budget_counts_what_earlier_runs_spent(tmp_path: Path) -> None:
    path = tmp_path / "work"
    head = filled(path, 0)
    path.write_bytes(head + b'{"cell": "kv/0", "seconds": 50.0, "value": 1}\n')
    with Journal(path, WHAT) as journal:
        assert not Budget(journal, "kv", 40).left(["kv/1"])
        assert Budget(journal, "kv", 40).left(["kv/0"])  # costs nothing
        assert Budget(journal, "kv", 60).left(["kv/1"])
        assert Budget(journal, "retrieval", 1).left(["retrieval/0"])
        assert Budget(journal, "kv", None).left(["kv/1"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_may_be_there(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "work"
    path.unlink(missing_ok=True)
    header = filled(path, 0)
    cells = [{"cell": f"kv/{i}", "seconds": 0.25, "value": {"value": i}} for i in range(3)]
    whole = bytearray(header + b"".join(json.dumps(cell).encode() + b"\n" for cell in cells))
    kind = data.draw(st.sampled_from(["flip", "junk", "lines"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "junk":
        whole = bytearray(data.draw(st.binary(max_size=200)))
    else:
        value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists)
        entry = {"cell": data.draw(value), "seconds": data.draw(value), "value": data.draw(value)}
        whole += json.dumps(entry).encode() + b"\n"
    path.write_bytes(bytes(whole))
    with Journal(path, WHAT) as journal:
        assert 0 <= journal.seconds("") < 1e10
        assert journal.cell("new", lambda: 7) == 7
    with Journal(path, WHAT) as journal:
        assert journal.cell("new", never) == 7


def test_arrays_come_back_bit_for_bit_or_not_at_all() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert np.array_equal(unpack(pack(values), (2, 3, 5)), values)  # type: ignore[arg-type]
    for bad in (None, 5, "", "?" * 320, pack(values[:1]), pack(values * np.nan), {"a": 1}):
        assert unpack(bad, (2, 3, 5)) is None
