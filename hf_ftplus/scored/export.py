"""Our tasks as tasks of lm-evaluation-harness: the same rows, asked there, and scored by the same functions.

    FOLDER/NAME.yaml          the task, for `lm-eval run --include_path FOLDER --tasks ftplus_NAME`
    FOLDER/NAME.jsonl         its rows: prompt, completion; choices, and which is right
    FOLDER/ftplus_scores.py   how an answer is scored; needs hf-ftplus beside the harness

A task without a metric is scored by how likely the harness finds the whole answer (`acc`: it is the greedy one), for it
knows no token accuracy. A choice is scored without the end of the turn, which ours counts. Rows of chat hold the user's
message: ask them with --apply_chat_template.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import disk
from ..errors import DataError, UsageError
from ..evaluation.metrics import graded
from ..evaluation.runner import REASONED
from ..evaluation.tasks import expected, opening
from ..metric import parse
from ..rows import noting, together
from .plan import Found, Plan, find

logger = logging.getLogger("hf_ftplus")

SCORES = '''"""How `ftplus eval` scores a written answer. Needs hf-ftplus where lm-evaluation-harness runs."""

from hf_ftplus.scored.export import process_results  # noqa: F401
'''
TOKENS = 48
"""Of an answer, at least; as many as the expected ones may need more."""


class Function(str):
    """What the harness reads as `!function MODULE.NAME`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", name))


def export(plan: Plan, folder: Path) -> list[str]:
    """Write every task of a plan; returns their names there.

    What the harness cannot ask is left out, and said: rows that the first model would write, or of several messages.

    Raises:
        DataError: nothing but such rows.
        UsageError: two tasks would have one name.
        StorageError: the folder cannot be written.
    """
    named = {task.asked.name: task for task in find(plan)}
    places = {name: "ftplus_" + re.sub(r"\W+", "_", name).strip("_") for name in named}
    if len(set(places.values())) < len(places):
        raise UsageError(f"Of {', '.join(places)} two have the same name for the harness. Rename one.")
    texts, faults = {"ftplus_scores.py": SCORES}, []
    for name, found in named.items():
        with noting(faults):
            rows = _rows(found)
            texts[f"{places[name]}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
            settings = _settings(places[name], folder, found.asked.metric, rows)
            texts[f"{places[name]}.yaml"] = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if len(faults) == len(named):
        raise together(faults)
    for fault in faults:
        logger.warning("%s", fault)
    with disk.attempt(f"--export {folder}", "another folder"):
        for name, text in texts.items():
            disk.write(folder / name, text)
    return [name for name in places.values() if f"{name}.yaml" in texts]


def _rows(found: Found) -> list[dict[str, Any]]:
    name = found.asked.name
    if found.rows is None or found.unanswered:
        raise DataError(
            f"{name} cannot be exported: its answers are written by the model that is scored first. Give rows with "
            f"completions: --measure {name}=DATA"
        )
    rows = []
    for number, row in enumerate(found.rows, 1):
        asked = opening(row)
        if not isinstance(asked, str) and len(asked) != 1:
            raise DataError(
                f"{name} cannot be exported: row {number} has {len(asked)} messages before its answer; the harness's "
                "tasks ask one."
            )
        prompt = asked if isinstance(asked, str) else asked[0]["content"]
        kept = {"prompt": prompt, "completion": expected(row), "metric": found.asked.metric or ""}
        choices = list(row.get("choices") or ()) if found.asked.metric in (None, "choice") else []
        if choices and kept["completion"] not in choices:
            raise DataError(
                f"{name} cannot be exported: the completion of row {number} is none of its 'choices'. Correct it, or "
                f"type --metric {name}=exact_match."
            )
        rows.append(kept | ({"choices": choices, "right": choices.index(kept["completion"])} if choices else {}))
    return rows


def _settings(name: str, folder: Path, metric: str | None, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the YAML of a task holds."""
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").absolute())}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "target_delimiter": "",
    }
    if metric == "choice" or (metric is None and all("choices" in row for row in rows)):
        choosing = {"doc_to_choice": "choices", "doc_to_target": "right"}
        return settings | choosing | {"output_type": "multiple_choice", "metric_list": [_mean("acc")]}
    if metric is None:
        return settings | {"output_type": "loglikelihood", "metric_list": [_mean("acc")]}
    asked = parse(metric, name)
    room = max(TOKENS, 2 * max(len(row["completion"]) for row in rows), REASONED if asked.pattern else 0)
    return settings | {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": room},
        "process_results": Function("ftplus_scores.process_results"),
        "metric_list": [_mean(asked.name)],
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What the harness calls for each row: the answer's score under its metric's name."""
    metric = parse(doc["metric"], "ftplus_scores.py")
    return {metric.name: graded(results[0], doc["completion"], metric) or 0.0}
