"""BFCL's multi-turn conversations: the simulated APIs of the package bfcl-eval, run for real, and its own checks.

bfcl-eval evaluates calls as Python text. Here a call is a name among those that were offered and JSON arguments, and a
method is called with them: no text of a model is ever evaluated.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import BadText
from lowbit.measure.tasks import _source, tool_calls

_CATEGORY = "multi_turn_base"


def entries() -> list[dict[str, Any]]:
    """The conversations, each with its "ground_truth": for every turn the calls as Python text. Raises NotFound."""
    data = tool_calls.data_folder(f"bfcl:{_CATEGORY}")
    file = f"BFCL_v4_{_CATEGORY}.json"
    _, answers = _source.read(data / "possible_answer" / file)
    wanted = {line.text("id"): line.fields["ground_truth"] for line in answers}
    return [{**line.fields, "ground_truth": wanted[line.text("id")]} for line in _source.read(data / file)[1]]


def functions(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that a conversation offers, as BFCL describes them."""
    docs = _config("MULTI_TURN_FUNC_DOC_FILE_MAPPING")
    folder = tool_calls.data_folder(f"bfcl:{_CATEGORY}") / "multi_turn_func_doc"
    left_out = set(entry.get("excluded_function") or ())
    found: list[dict[str, Any]] = []
    for name in entry["involved_classes"]:
        lines = (folder / docs[name]).read_text(encoding="utf-8").splitlines()
        found += [json.loads(line) for line in lines if line.strip()]
    return [function for function in found if function["name"] not in left_out]


class World:
    """The APIs of one conversation in their initial state. instances: by class, for bfcl-eval's state_checker."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        paths, stateless = _config("CLASS_FILE_PATH_MAPPING"), _config("STATELESS_CLASSES")
        self.instances: dict[str, Any] = {}
        self._offered = {function["name"] for function in functions(entry)}
        for name in entry["involved_classes"]:
            instance = getattr(importlib.import_module(paths[name]), name)()
            if name not in stateless:
                instance._load_scenario(copy.deepcopy(entry["initial_config"].get(name, {})), long_context=False)
            self.instances[name] = instance

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The result as bfcl-eval writes it; what goes wrong is a result too."""
        method = None
        if name in self._offered and not name.startswith("_"):
            found = (getattr(instance, name, None) for instance in self.instances.values())
            method = next((m for m in found if callable(m)), None)
        if method is None:
            return f"Error during execution: there is no function {name}"
        try:
            result = method(**copy.deepcopy(dict(arguments)))
        except Exception as error:  # a simulated API may fail in any way on a model's arguments
            return f"Error during execution: {error}"
        if isinstance(result, str):
            return result
        return json.dumps(result, default=str) if isinstance(result, dict) else str(result)


class Checked:
    """Plays the right calls beside the model's, a turn at a time."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.world, self._wanted, self._entry = World(entry), World(entry), entry
        self._results: list[str] = []  # of all of the model's calls so far

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        result = self.world.call(name, arguments)
        self._results.append(result)
        return result

    def turn_is_right(self, turn: int, calls: int) -> bool:
        """By bfcl-eval's own rules: the state after the turn is that of the right calls, and their results are all
        among those that the model has seen. calls: how many the model made in this turn."""
        checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
        wanted = written(self._entry, turn)
        results = [self._wanted.call(name, arguments) for name, arguments in wanted]
        if not wanted:
            return True
        if not calls:
            return False
        state = checker.state_checker(self.world.instances, self._wanted.instances)
        return bool(state["valid"] and checker.response_checker(self._results, results, turn)["valid"])


def written(entry: Mapping[str, Any], turn: int) -> list[tuple[str, dict[str, Any]]]:
    """The right calls of a turn, read from their Python text; only literals are. Raises BadText."""
    order = {f["name"]: list(f["parameters"]["properties"]) for f in functions(entry)}
    return [_call(text, order, str(entry["id"])) for text in entry["ground_truth"][turn]]


def _call(text: str, order: Mapping[str, Sequence[str]], where: str) -> tuple[str, dict[str, Any]]:
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        name = node.func.id
        arguments = dict(zip(order[name], map(ast.literal_eval, node.args), strict=False))
        named = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (ValueError, SyntaxError, KeyError) as error:
        raise BadText("not a call with literal arguments", where=where, found=text[:80]) from error
    return name, arguments | named


def _config(name: str) -> Any:
    return getattr(importlib.import_module("bfcl_eval.constants.executable_backend_config"), name)
