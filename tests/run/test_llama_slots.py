"""Sequences side by side give what each gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowbit.errors import BadOption, RuntimeFailed
from lowbit.run._llama_slots import Slots
from lowbit.run.llama_cpp import LlamaCpp

EXACT = {"threads": 1, "kv_type": "f32", "flash_attention": False}


def alone(path: Path, ids: list[int]) -> np.ndarray:
    with LlamaCpp(path, context=1024, **EXACT) as model:  # type: ignore[arg-type]
        return np.concatenate([rows for _, rows in model.logits(ids)])[-1]


@pytest.mark.parametrize("unified", [False, True])
def test_slots_do_not_disturb_each_other(tiny: Path, unified: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(3, 250, (3, 90))
    with Slots(tiny, sequences=3, context=512, unified=unified, **EXACT) as slots:
        slots.extend(rows[:, :60], [0, 1, 2], last=False)
        found = slots.extend(rows[:, 60:], [0, 1, 2]).copy()
        assert slots.lengths == [90, 90, 90]
    for row, ids in zip(found, rows, strict=True):
        np.testing.assert_allclose(row, alone(tiny, ids.tolist()), atol=2e-4)


@pytest.mark.parametrize("unified", [False, True])
def test_a_copy_goes_on_by_itself(tiny: Path, unified: bool) -> None:
    ids = np.random.default_rng(1).integers(3, 250, 200).tolist()
    with Slots(tiny, sequences=3, context=512, unified=unified, **EXACT) as slots:
        slots.extend(ids[:150], [0], last=False)
        for branch in ([5, 6, 7], [8]):
            slots.copy(0, 1)
            found = slots.extend(branch, [1])[0].copy()
            np.testing.assert_allclose(found, alone(tiny, ids[:150] + branch), atol=2e-4)
            slots.drop(1)
        found = slots.extend(ids[150:], [0])[0]
        np.testing.assert_allclose(found, alone(tiny, ids), atol=2e-4)


def test_more_than_a_batch_goes_in_pieces(tiny: Path) -> None:
    rows = np.random.default_rng(2).integers(3, 250, (3, 900))
    with Slots(tiny, sequences=3, context=1024, **EXACT) as slots:
        found = slots.extend(rows, [0, 1, 2]).copy()
    np.testing.assert_allclose(found[2], alone(tiny, rows[2].tolist()), atol=2e-4)


def test_a_full_cache_is_an_error_in_one_line(tiny: Path) -> None:
    with Slots(tiny, sequences=2, context=256, unified=True, threads=1) as slots:
        slots.extend(np.full(200, 5), [0], last=False)
        with pytest.raises(RuntimeFailed, match="could not decode"):
            slots.extend(np.full(100, 5), [1])
    with pytest.raises(BadOption):
        Slots(tiny, sequences=0, context=256)


def test_a_cache_beside_shares_the_weights(tiny: Path) -> None:
    ids = np.random.default_rng(3).integers(3, 250, 120).tolist()
    with LlamaCpp(tiny, context=256, threads=1, kv_type="f16") as model:
        coarse = model.beside(kv_type="q8_0:q4_0")
        mixed = np.concatenate([rows for _, rows in coarse.logits(ids)])
        plain = np.concatenate([rows for _, rows in model.logits(ids)])
        coarse.close()
        assert np.array_equal(np.concatenate([rows for _, rows in model.logits(ids)]), plain)
        left_open = model.beside(kv_type="q4_0")
    with LlamaCpp(tiny, context=256, threads=1, kv_type="q8_0:q4_0") as other:
        assert np.array_equal(np.concatenate([rows for _, rows in other.logits(ids)]), mixed)
    assert not np.array_equal(mixed, plain)
    with pytest.raises(RuntimeFailed, match="closed"):
        list(left_open.logits(ids))


def test_spans_are_the_rows_of_the_whole(tiny: Path) -> None:
    ids = np.random.default_rng(4).integers(3, 250, 200).tolist()
    with LlamaCpp(tiny, context=256, ubatch=64, **EXACT) as model:  # type: ignore[arg-type]
        whole = np.concatenate([rows for _, rows in model.logits(ids)])
        found = list(model.logits_of(ids, [(10, 30), (30, 31), (100, 180)]))
        positions = np.concatenate([np.arange(o, o + len(rows)) for o, rows in found])
        assert positions.tolist() == [*range(10, 31), *range(100, 180)]
        np.testing.assert_allclose(np.concatenate([rows for _, rows in found]), whole[positions], atol=1e-4)
