"""Files sent to machines that do not have them: whole, the right ones, and nothing left of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.batch.engines import EngineOptions
from lowbit.batch.engines import _shipping as shipping
from lowbit.batch.engines._ray_worker import Work, placed
from lowbit.batch.engines._shipping import Needed, Receiving, Sending
from lowbit.errors import BadFile, CannotWrite
from lowbit.files import sha256
from lowbit.model_server import ModelOptions

SIZE = 2 * shipping.PIECE + 12345


@pytest.fixture
def needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Needed:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * (SIZE // 256) + b"x" * (SIZE % 256))
    return Needed.of(path)


def send(needed: Needed, change: Callable[[bytes], bytes] = bytes) -> tuple[Path, int]:
    """Where it came to, and how often a piece was read for two who took it at the same time."""
    puts = 0

    def put(piece: bytes) -> bytes:
        nonlocal puts
        puts += 1
        return change(piece)

    async def work() -> str:
        sending = Sending(needed, put)
        digest = await sending.digest()
        both = [Receiving(needed, digest) for _ in range(2)]

        async def take(receiving: Receiving) -> None:
            async def one(piece: bytes) -> None:
                receiving.write(piece)

            await sending.to(one)
            receiving.finish()

        await asyncio.gather(*map(take, both))
        return digest

    return shipping.place(needed, asyncio.run(work())), puts


def test_two_get_it_and_each_piece_is_read_once(needed: Needed) -> None:
    path, puts = send(needed)
    assert puts == 3
    assert path.read_bytes() == Path(needed.path).read_bytes() and path.parent.name == sha256(path)
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    assert shipping.cached(needed, path.parent.name)


def test_what_was_changed_on_the_way_is_refused_and_nothing_is_left(needed: Needed, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="another file came than was announced"):
        send(needed, lambda piece: b"y" + piece[1:])
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_what_is_in_the_cache_and_is_another_file_goes(needed: Needed) -> None:
    path, _ = send(needed)
    with open(path, "r+b") as handle:
        handle.seek(SIZE // 2)
        handle.write(b"?")
    assert not shipping.cached(needed, sha256(needed.path)) and not path.exists()


def test_a_file_that_is_there_by_its_path_is_known(needed: Needed) -> None:
    assert needed.here()
    with open(needed.path, "ab") as handle:
        handle.write(b"more")
    assert not needed.here()
    Path(needed.path).unlink()
    assert not needed.here()


def test_no_room_is_said_before_anything_is_sent(needed: Needed) -> None:
    huge = Needed(needed.path, needed.name, 1 << 60, needed.ends)
    with pytest.raises(CannotWrite, match="no room for the model"):
        Receiving(huge, "0" * 64)


def test_a_folder_is_put_together_from_links(needed: Needed) -> None:
    path, _ = send(needed)
    first = shipping.as_folder([("a.json", path), ("b.safetensors", path)])
    assert first == shipping.as_folder([("b.safetensors", path), ("a.json", path)])
    assert {p.name: p.read_bytes() == path.read_bytes() for p in first.iterdir()} == {
        "a.json": True,
        "b.safetensors": True,
    }


def test_a_checkpoint_of_which_a_node_lacks_a_file_is_a_folder_there_again(needed: Needed, tmp_path: Path) -> None:
    """One file by its path and one from the cache, by the names that they have in the folder; a template beside it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = Path(needed.path).rename(folder / "model.safetensors")
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    sent = Needed.of(weights)
    files = (Needed.of(folder / "config.json"), sent, Needed.of(template))
    cached, _ = send(sent)
    options = EngineOptions(model=str(folder), server=ModelOptions(template=template))
    work = Work(options, files, str(folder), 100, vllm=True)
    assert placed(work, {}) == options, "all of it is here by its path"
    found = placed(work, {sent.path: cached.parent.name})
    assert found.model is not None and found.model != str(folder) and found.server.template == template
    assert {p.name: p.resolve() for p in Path(found.model).iterdir()} == {
        "config.json": folder / "config.json", "model.safetensors": cached,
    }  # fmt: skip


def test_a_model_and_what_belongs_to_it_are_found_where_they_came_to(needed: Needed, tmp_path: Path) -> None:
    drafter = tmp_path / "drafter.gguf"
    drafter.write_bytes(b"small")
    options = EngineOptions(model=needed.path, server=ModelOptions(drafter=drafter))
    work = Work(options, (needed, Needed.of(drafter)), None, 100, vllm=False)
    cached, _ = send(needed)
    found = placed(work, {needed.path: cached.parent.name})
    assert found.model == str(cached) and found.server.drafter == drafter
