"""lm-eval's task files, looked at before lm-eval reads them: a task from a stranger is not to run code here.

Three ways lead from such a file to code: a ``!function`` tag, a metric that Hugging Face's evaluate loads as a script,
and a Jinja template, which lm-eval renders outside a sandbox. The first two are refused unless the user confirms; the
third is rendered in Jinja's sandbox always.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import BadText, NotFound, Unsupported
from lowbit.units import MIB, format_bytes

_LARGEST = MIB
_MOST_NODES = 100_000  # anchors can name each other until a small file is a huge one
_CONFIRM = "--confirm-run-unsafe-code allows it, for files that you trust"


def read(path: Path, *, allow_code: bool) -> dict[str, Any]:
    """The task as lm-eval wants it, with data files named beside the YAML found there.

    Raises NotFound; BadText for what is no YAML of a task; Unsupported for code without ``allow_code``.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    _check(path, allow_code, [])
    try:
        config = load_yaml(path)
    except Exception as error:  # a named function may raise anything
        raise BadText("lm-eval cannot read this task", where=path, found=_brief(error)) from error
    if not isinstance(config.get("task"), str):
        raise BadText("no task of its own in this file", where=path, found=repr(config.get("task"))[:60],
                      expected="task: NAME (a group is asked for by its name)")  # fmt: skip
    if not allow_code:
        _check_metrics(path, config)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        config["dataset_kwargs"] = {**kwargs, "data_files": _beside(path.parent, kwargs["data_files"])}
    return config


def sandbox() -> None:
    """Makes lm-eval render its templates in Jinja's sandbox, for as long as the process lives."""
    import jinja2
    import lm_eval.utils as utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        safe = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        safe.filters.update(utils.env.filters)
        utils.env = safe


def _check(path: Path, allow_code: bool, above: list[Path]) -> None:
    """One file and those it includes."""
    import yaml

    path = path.resolve()
    if path in above:
        raise BadText("the task includes itself", where=path)
    try:
        if path.stat().st_size > _LARGEST:
            raise BadText("too large for a task", where=path, expected=f"{format_bytes(_LARGEST)} at most")
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise NotFound("no such task file", where=path, expected="lm-eval's YAML") from None
    except OSError as error:
        raise BadText("the task file cannot be read", where=path, found=error.strerror) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadText("not YAML", where=path, found=_brief(error)) from None
    for n, part in enumerate(_nodes(node)):
        if n > _MOST_NODES:
            raise BadText("too many parts for a task", where=path, expected=f"{_MOST_NODES} at most")
        if not part.tag.startswith("tag:yaml.org,2002:") or part.tag.startswith("tag:yaml.org,2002:python"):
            at = f"{path}: line {part.start_mark.line + 1}"
            if not (allow_code and part.tag == "!function"):
                raise Unsupported("the task runs code", where=at, found=f"{part.tag} {part.value!s:.60}", hint=_CONFIRM)
    for included in _included(node):
        _check(path.parent / included, allow_code, [*above, path])


def _nodes(root: Any) -> Iterator[Any]:
    waiting = [root] if root is not None else []
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node.value, list):
            for child in node.value:
                waiting.extend(child if isinstance(child, tuple) else [child])


def _included(root: Any) -> list[str]:
    if root is None or not isinstance(root.value, list):
        return []
    found = [entry[1] for entry in root.value if isinstance(entry, tuple) and entry[0].value == "include"]
    return [part.value for node in found for part in (node.value if isinstance(node.value, list) else [node])]


def _check_metrics(path: Path, config: dict[str, Any]) -> None:
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    listed = config.get("metric_list") or []
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if name not in metric_registry or entry.get("hf_evaluate"):
            raise Unsupported("the task's metric is code that lm-eval would fetch and run", where=path,
                              found=repr(name)[:60], expected="one of lm-eval's own", hint=_CONFIRM)  # fmt: skip


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {key: _beside(folder, value) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(folder, value) for value in files]
    path = folder / str(files)
    return str(path.resolve()) if path.exists() else files


def _brief(error: BaseException) -> str:
    lines = " ".join(str(error).split())
    return f"{type(error).__name__}: {lines[:160]}"
