"""Public benchmarks: tasks of lm-evaluation-harness, asked of the model that is in memory already.

Its tasks bring their own prompts, answers and metrics; what comes back is a score for every row, which is compared as
that of any task is. Nothing of it is imported unless it is asked for.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, FTPlusError, UsageError, nearest, reason
from ..evaluation.found import as_found
from ..row_checks import places
from ..trained import Trained
from . import content

PACKAGE = "lm_eval"
FEWSHOT_SEED = 1234
"""The harness's own."""


@dataclass
class Outcome:
    """What a model did on one benchmark."""

    metric: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of each: prompt, expected, answer, and a score from 0 to 1."""
    of: int = 0
    """Rows that the benchmark has; those asked are spread evenly over them."""


def as_outcome(kept: Any) -> Outcome | None:
    """What was kept of a benchmark; None for half of one, or one of somebody else."""
    if not isinstance(kept, dict) or set(kept) != set(vars(Outcome(""))):
        return None
    rows = kept["rows"]
    known = isinstance(rows, list) and rows and all(isinstance(row, dict) and "prompt" in row for row in rows)
    return Outcome(**kept) if known and all(isinstance(row.get("score"), (int, float)) for row in rows) else None


@dataclass(frozen=True)
class Benchmark:
    """One task of the harness, with its rows loaded."""

    name: str
    task: Any
    rows: int

    def content(self) -> str:
        """Its settings, the code that they name, the rows asked and those shown, and the version of the harness."""
        docs = list(self.task.eval_docs)
        shown = list(self.task.fewshot_docs()) if self.task.get_config("num_fewshot") else []
        settings = _plain(vars(self.task.config))
        asked = [docs[place] for place in self._places()]
        return content.digest([settings, self.task.dump_config(), asked, _plain(shown), metadata.version(PACKAGE)])

    def _places(self) -> list[int]:
        length = len(self.task.eval_docs)
        return places(length, min(length, self.rows))

    def measure(self, model: Trained, batch_size: int, seed: int, metric: str | None = None) -> Outcome:
        """Ask it of a model: rows that are spread evenly, with the same examples before them at every call.

        Args:
            metric: what to score by, as the model that this one is compared with was; else the first that fits.

        Raises:
            DataError: the harness cannot score it, or has no metric that is better when higher.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)  # its generator moves on with every call
        asked = {self.name: self._places()}
        try:
            with quiet, as_found(model.model, seed):
                harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
                # not simple_evaluate, which reads the harness's 14,000 YAML files again for every call
                found = lm_eval.evaluate(harness, {"tasks": {self.name: self.task}}, samples=asked, bootstrap_iters=0)
        except (FTPlusError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a task, which may be anybody's
            raise DataError(f"--lm-eval {self.name}: {type(error).__name__}: {reason(error)}") from error
        return _outcome(self.name, found, len(self.task.eval_docs), metric)


def _outcome(name: str, found: dict[str, Any], of: int, asked: str | None) -> Outcome:
    """By the metric asked for, or the first that is better when higher, of the first filter of the answers."""
    samples, better = found["samples"][name], found["higher_is_better"][name]
    kept = [row for row in samples if row["filter"] == samples[0]["filter"]]
    fits = [key for key in better if better[key] and all(_graded(row.get(key)) for row in kept)]
    metric = next((key for key in fits if asked in (None, key)), None)
    if metric is None:
        raise DataError(
            f"--lm-eval {name}: its metrics are {', '.join(better)}; expected {asked or 'one'} with a score from 0 to "
            "1 for each row that is better when higher."
        )
    return Outcome(
        metric,
        [
            {
                "prompt": str(row["arguments"][0][0]),
                "expected": str(row["target"]),
                "answer": str(row["filtered_resps"]),
                "written": str(row["resps"]),
                "score": float(row[metric]),
            }
            for row in sorted(kept, key=lambda row: row["doc_id"])
        ],
        of,
    )


def _plain(value: Any) -> Any:
    """Settings as plain values; a function by the text of its whole file, since it may call others there."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if callable(value):
        try:
            return [getattr(value, "__qualname__", ""), Path(inspect.getfile(value)).read_text(encoding="utf-8")]
        except (TypeError, OSError):  # of an object, or built in
            return getattr(value, "__qualname__", type(value).__qualname__)
    return value if isinstance(value, (str, int, float, bool, type(None))) else re.sub(r" at 0x\w+", "", str(value))


def _graded(value: Any) -> bool:
    try:
        return 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return False


def load(names: list[str], include: Path | None, rows: int) -> list[Benchmark]:
    """The tasks of these names; groups are taken apart.

    Args:
        names: as the harness knows them, or as a YAML file in `include` names itself.
        include: a folder of such files; if it holds all of them the harness's own 14,000 are not looked through.
        rows: of each, spread evenly over it.

    Raises:
        UsageError: the harness is not installed, or has no such task.
        DataError: the rows of a task cannot be loaded.
    """
    if find_spec(PACKAGE) is None:
        raise UsageError("--lm-eval needs lm-evaluation-harness. Type: pip install 'hf-ftplus[lm-eval]'")
    if include and not include.is_dir():
        raise UsageError(f"--lm-eval-include {include} is no folder; expected one with YAML files of tasks.")
    from lm_eval.tasks import TaskManager

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=str(include) if include else None)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(
                f"--lm-eval {name}: no such task.{nearest(name, manager.all_tasks)} `lm-eval ls tasks` lists them; "
                "name the folder of your own with --lm-eval-include."
            )
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
            loaded = manager.load(names)["tasks"]
    except Exception as error:  # of a task's own code, or of `datasets`
        raise DataError(f"--lm-eval {','.join(names)}: {type(error).__name__}: {reason(error)}") from error
    return [_settled(Benchmark(name, task, rows)) for name, task in loaded.items()]


def _settled(benchmark: Benchmark) -> Benchmark:
    """What `lm_eval.simple_evaluate` sets: no examples in the prompt where none are asked for, and which ones else."""
    task = benchmark.task
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return benchmark
