"""What a release's lock names is what is served: template, drafter, projector."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit import memory, plan
from lowbit.errors import BadFile, NotFound
from lowbit.harness import of_model
from lowbit.model_server import ModelOptions, ModelServer, artifact, settled
from lowbit.release import lock as locks
from lowbit.release.lock import Lock, Locked
from lowbit.release.walk import hash_member

TEMPLATE = "{% for m in messages %}[{{ m['content'] if m['content'] is string else 'parts' }}]{% endfor %}marked"
ROLES = {"text.gguf": "artifact", "draft.gguf": "drafter", "mmproj.gguf": "projector", "chat.jinja": "chat_template"}


def write_lock(root: Path, *names: str) -> None:
    members = []
    for name in names:
        whole, _ = hash_member(root / name)
        container = "text" if name.endswith(".jinja") else "gguf"
        members.append(Locked(role=ROLES[name], path=name, container=container, size=whole.size, sha256=whole.sha256))
    locks.write(root / locks.LOCK_NAME, Lock(members=tuple(members)))


@pytest.fixture(scope="module")
def made(tiny_towers: Callable[..., tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, root = tiny_towers("gemma3")[0], tmp_path_factory.mktemp("locked")
    lowbit.pack(folder, "q8_0", root / "text.gguf")
    lowbit.pack(folder, "q8_0", root / "mmproj.gguf", mmproj=True)
    shutil.copyfile(root / "text.gguf", root / "draft.gguf")
    (root / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    return root


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "release"))


def asked(path: Path, options: ModelOptions) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """/props and /slots of the server that is started for it."""

    async def go() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        server = ModelServer(path, options, lambda url: None)
        try:
            await server.start()
            assert server.server is not None
            return server.server.props(), server.server.slots()
        finally:
            await server.close()

    return asyncio.run(go())


@pytest.mark.parametrize("named", [["draft.gguf", "chat.jinja"], ["mmproj.gguf"], []], ids=" ".join)
def test_what_the_lock_names_is_served(release: Path, named: list[str]) -> None:
    write_lock(release, "text.gguf", *named)
    assert artifact(release) == release / "text.gguf"
    options = settled(artifact(release), ModelOptions(context=256, slots=2, threads=1))
    props, slots = asked(release / "text.gguf", options)
    assert (props["chat_template"] == TEMPLATE) == ("chat.jinja" in named)
    assert [slot["speculative"] for slot in slots] == ["draft.gguf" in named] * 2
    assert props["modalities"]["vision"] == ("mmproj.gguf" in named)


def test_flags_go_before_the_lock(release: Path) -> None:
    write_lock(release, *ROLES)
    other = release / "other.jinja"
    other.write_text("other", encoding="utf-8")
    options = settled(release / "text.gguf", ModelOptions(context=256, template=other))
    assert options.template == other and options.drafter == release / "draft.gguf"
    assert of_model.told_by_template(release / "text.gguf", other) == (None, False)


def test_a_lock_of_another_file_is_not_asked(release: Path) -> None:
    write_lock(release, "text.gguf", "draft.gguf")
    (release / "text.gguf").rename(release / "renamed.gguf")
    assert settled(release / "renamed.gguf", ModelOptions(context=256)).drafter is None


@pytest.mark.parametrize("name", ["draft.gguf", "mmproj.gguf", "chat.jinja"])
def test_a_stale_lock_is_refused(release: Path, name: str) -> None:
    write_lock(release, *ROLES)
    with open(release / name, "ab") as handle:
        handle.write(b" ")
    with pytest.raises(BadFile, match="not what the lock names"):
        settled(release / "text.gguf", ModelOptions(context=256))
    (release / name).unlink()
    with pytest.raises(BadFile, match="not what the lock names"):
        settled(release / "text.gguf", ModelOptions(context=256))


def test_a_template_that_was_changed_in_place_is_refused(release: Path) -> None:
    """It is read by the model's server at every request, and small enough to be hashed."""
    write_lock(release, *ROLES)
    (release / "chat.jinja").write_text(TEMPLATE.replace("marked", "forged"), encoding="utf-8")
    with pytest.raises(BadFile, match="not what the lock names"):
        settled(release / "text.gguf", ModelOptions(context=256))


def test_a_folder_without_one_artifact(release: Path) -> None:
    with pytest.raises(NotFound, match="no one GGUF"):
        artifact(release)


@pytest.mark.parametrize("gib", [0.5, 1.5, 3, 64])
def test_cached_prompts_leave_room_for_the_model(release: Path, monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    free = int(gib * 2**30)
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    path = release / "text.gguf"
    options = ModelOptions(context=256, slots=2, kv_unified=True)
    planned = plan.plan(path, plan.PlanOptions(context=256, slots=2, kv_unified=True)).total_bytes
    found = settled(path, options).cache_ram
    assert found is not None
    assert found == min(8192, max(0, (free - 2**30 - planned) // 2**21))
    assert planned + found * 2**20 + 2**30 <= max(free, planned + 2**30)
    assert settled(path, replace(options, cache_ram=17)).cache_ram == 17
