"""In a child process with little time and memory: looks at a stranger's chat template and renders it in the sandbox.

Reads {template, bos_token, eos_token, jobs: [{messages, tools, add_generation_prompt, variables}]} from standard input,
writes {renderer, unsafe: [sentence], results: [{text} or {refused} or {error} or {escape} or {too_much}]} to standard
output. Renders with transformers' own function where that is installed, else with lowbit's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

_SECONDS, _BYTES, _LONGEST = 3, 512 << 20, 4 << 20
_OUT = (
    "__class__", "__mro__", "__bases__", "__base__", "__subclasses__", "__globals__", "__builtins__", "__import__",
    "__init__", "__dict__", "__code__", "__reduce__", "__getattribute__", "f_globals", "gi_frame", "mro",
)  # fmt: skip
Renderer = Callable[[dict[str, Any], dict[str, Any]], str]


def main() -> None:
    asked = json.load(sys.stdin)
    name, environment, render = _renderer(asked["template"])
    _limit()
    found: dict[str, Any] = {"renderer": name, "unsafe": [], "results": []}
    try:
        found["unsafe"] = list(_unsafe(environment, asked["template"]))
    except Exception as error:  # a template that does not parse: jinja2's own, RecursionError, ...
        found["results"] = [{"error": _said(error)}] * len(asked["jobs"])
    for job in asked["jobs"] if not found["results"] else ():
        found["results"].append(_result(render, asked, job))
    json.dump(found, sys.stdout)


def _renderer(template: str) -> tuple[str, Any, Renderer]:
    """Its name, a Jinja environment that parses what it renders, and the function."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        from importlib import metadata

        from transformers.utils import chat_template_utils

        def by_transformers(asked: dict[str, Any], job: dict[str, Any]) -> str:
            special = {key: asked[key] for key in ("bos_token", "eos_token") if asked.get(key) is not None}
            made = chat_template_utils.render_jinja_template(
                conversations=[job["messages"]],
                tools=job.get("tools"),
                chat_template=asked["template"],
                add_generation_prompt=job["add_generation_prompt"],
                **special,
                **job.get("variables", {}),
            )
            return str(made[0][0])  # (texts, where answers lie)

        environment = chat_template_utils._compile_jinja_template("").environment
        return f"transformers {metadata.version('transformers')}", environment, by_transformers
    except ImportError:
        pass
    from lowbit.run import _chat_template

    def by_lowbit(asked: dict[str, Any], job: dict[str, Any]) -> str:
        return _chat_template.render(
            asked["template"], job["messages"],
            bos_token=asked.get("bos_token") or "", eos_token=asked.get("eos_token") or "",
            add_generation_prompt=job["add_generation_prompt"], tools=job.get("tools"), **job.get("variables", {}),
        )  # fmt: skip

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    return "jinja2", environment, by_lowbit


def _limit() -> None:
    """From here on, no more than a few seconds and half a GiB; where the system has limits."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock remains
        return
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + _SECONDS, used + _SECONDS + 1))
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/statm") as handle:
            now = int(handle.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _BYTES, now + _BYTES))


def _result(render: Renderer, asked: dict[str, Any], job: dict[str, Any]) -> dict[str, str]:
    from jinja2.exceptions import SecurityError, TemplateRuntimeError, TemplateSyntaxError, UndefinedError

    from lowbit.errors import BadOption

    try:
        text = render(asked, job)
    except SecurityError as error:
        return {"escape": _said(error)}
    except (MemoryError, OverflowError) as error:
        return {"too_much": _said(error)}
    except (TemplateSyntaxError, TemplateRuntimeError, UndefinedError) as error:
        return {"error": _said(error)}
    except BadOption as error:
        return {"refused": _said(error)}
    except Exception as error:  # raise_exception's TemplateError, and whatever a template's arithmetic raises
        kind = "refused" if type(error).__name__ == "TemplateError" else "error"
        return {kind: _said(error)}
    return {"text": text} if len(text) <= _LONGEST else {"too_much": f"{len(text):,} characters"}


def _unsafe(environment: Any, template: str) -> Iterator[str]:
    """What a template says that only one does that wants out of its sandbox."""
    from jinja2 import nodes

    tree = environment.parse(template)
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Const, nodes.Filter)):
        if isinstance(node, nodes.Getattr) and node.attr.startswith("__"):
            yield f"it reads {node.attr[:40]} (line {node.lineno})"
        elif isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value in _OUT:
            yield f"it names {node.value} (line {node.lineno})"
        elif isinstance(node, nodes.Filter) and node.name == "attr":
            yield f"it reads attributes by computed names, with the filter attr (line {node.lineno})"
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield f"it loads another template (line {node.lineno})"


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    main()
