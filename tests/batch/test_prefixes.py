from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowbit.batch.prefixes import WORTH, Cache, State, common, text_of

A, B = "a" * 2 * WORTH, "b" * 2 * WORTH


@given(st.text("ab", max_size=20), st.text("ab", max_size=20), st.text("ab", max_size=20))
def test_common_is_what_a_plain_loop_finds(start: str, a: str, b: str) -> None:
    one, two = start + a, start + b
    loop = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    assert common(one, two) == loop


def test_prompts_that_begin_alike_have_texts_that_do() -> None:
    def body(rules: str, said: str) -> dict[str, object]:
        return {"max_tokens": len(said), "messages": [{"role": "system", "content": rules}, {"content": said}]}

    one, two, three = (text_of(body(*pair)) for pair in ((A, "x"), (A, "y"), (B, "x")))
    assert common(one, two) > len(A)
    assert common(one, three) < 100
    assert common(text_of({"prompt": A + "x"}), text_of({"prompt": A + "y", "n": 2})) >= len(A)
    assert common(text_of({"messages": [], "tools": [1]}), text_of({"messages": [], "tools": [2]})) < 10


def test_a_request_goes_where_most_of_it_is() -> None:
    cache = Cache(3)
    for said in (A + "1", B + "1", "c"):
        cache.take(cache.move(said, []).slot, said)
    for slot in list(cache._all):
        cache.give_back(slot)
    assert cache.move(B + "2", []).slot.text == B + "1"
    assert cache.move("short", []).slot.text == A + "1", "the one that was used first"


def test_what_others_begin_with_is_evaluated_once_and_saved() -> None:
    cache = Cache(3)
    first = cache.move(A + "1", [A + "2"])
    assert first.lead and not cache.move(A + "1", [B]).lead
    cache.take(first.slot, A + "1")
    cache.keep(State(A + "1", "f", 10))
    second = cache.move(A + "2", [])
    assert second.restore is not None and second.restore.file == "f" and second.slot is not first.slot
    cache.give_back(first.slot)
    third = cache.move(A + "3", [])
    assert third.slot is first.slot and third.restore is None and not third.save


def test_a_slot_that_has_it_is_saved_before_it_is_used() -> None:
    cache = Cache(2)
    slot = cache.move(A + "1", []).slot
    cache.take(slot, A + "1")
    cache.give_back(slot)
    move = cache.move(A + "2", [])
    assert move.slot is slot and move.save and move.had == A + "1"
    assert not cache.move(A + "2", [], saving=False).save
    alone = Cache(1)
    alone.take(alone.free[0], A)
    alone.give_back(alone._all[0])
    assert not alone.move(A + "2", []).save, "there is no other slot to give it to"


def test_states_have_their_bounds_and_the_oldest_go() -> None:
    cache = Cache(2, largest=25)
    assert cache.keep(State(A, "1", 10)) == [] and cache.keep(State(B, "2", 10)) == []
    cache.take(cache.free[0], "x")
    cache.move(A + "1", [])  # uses the first
    assert [state.file for state in cache.keep(State("c", "3", 10))] == ["2"]
    assert [state.file for state in cache.keep(State("d", "4", 99))] == ["1", "3", "4"], "larger than all may be"


def test_a_new_server_has_empty_slots_and_the_old_states() -> None:
    cache = Cache(2)
    old = cache.move(A, []).slot
    cache.take(old, A)
    cache.keep(State(A, "f", 1))
    cache.forget()
    cache.give_back(old)
    assert len(cache.free) == 2 and all(slot.text == "" for slot in cache.free)
    assert cache.move(A + "1", []).restore is not None
