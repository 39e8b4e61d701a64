"""Tasks as `tasks:` in a YAML file declares them: what is learnt and protected, from which rows, in which share.

    tasks, faults = read([{"name": "notes", "dataset": "notes.jsonl", "template": "Sum up: {{ text }}", ...}])
    tasks[0].load(seed)                  its rows, in a canonical format (formats.py)

Whatever is wrong is found at once: `read` returns every fault, and the tasks as far as they can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .errors import UsageError, escape
from .task_keys import KEYS, NEED_TEMPLATE, Fault, faults, shown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .specs import TaskSpec
    from .strategy import Strategy

ROUNDING = 1e-6
"""Shares that sum to 1 within this do: 0.1 + 0.2 + 0.7 is not quite 1."""


@dataclass(frozen=True)
class TaskConfig:
    """One task, as its keys (task_keys.py) say."""

    spec: TaskSpec
    """Its name, where its rows are, and the templates they go through."""
    role: str = "learn"
    share: float | None = None
    """Of all training rows."""
    metric: str | None = None
    measure: TaskSpec | bool = True
    """What is measured: other rows, its own (True), or nothing."""
    streaming: bool = False
    """Whether its rows are read as they are needed."""
    given: dict[str, Any] = field(default_factory=dict)
    """What stands in YAML."""

    @property
    def name(self) -> str:
        return self.spec.name

    def load(self, seed: int = 0) -> Dataset | IterableDataset:
        """Its rows; see `specs.TaskSpec.load`."""
        return self.spec.stream(seed) if self.streaming else self.spec.load(seed)


def read(given: Any, shared: bool = True) -> tuple[list[TaskConfig], list[str]]:
    """The tasks under `tasks:` without what is wrong with them, and everything that is.

    Args:
        given: a list of mappings, a mapping of names to mappings, or tasks that were read before.
        shared: whether training is shared out between them, which takes one to learn; else they are only looked at.
    """
    if given and isinstance(given, list) and all(isinstance(task, TaskConfig) for task in given):
        return given, []
    if isinstance(given, dict):
        given = [{"name": name, **entry} if isinstance(entry, dict) else entry for name, entry in given.items()]
    if given is not None and not (isinstance(given, list) and given):
        return [], [f"tasks: {shown(given)}; expected a list such as - {{name: sums, dataset: sums.jsonl}}"]
    tasks, wrong = [], []
    for number, entry in enumerate(given or (), 1):
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        where = f"tasks.{escape(entry['name'])}" if named else f"tasks, entry {number}"
        if isinstance(entry, dict):
            task, found = _task({key: value for key, value in entry.items() if value is not None})
            tasks += [task] if task else []
            wrong += [f"{where}: {said}" for _, said in found]
        else:
            wrong.append(f"{where} is {shown(entry)}; expected a mapping with the keys {', '.join(KEYS)}")
    wrong += [*_names(tasks), *(_shares(tasks, whole=len(tasks) == len(given or ())) if shared else ())]
    wrong += _streams(tasks) if shared else []
    return [_apart(task, tasks[:number], number) for number, task in enumerate(tasks)], wrong


def _task(entry: dict[str, Any]) -> tuple[TaskConfig | None, list[Fault]]:
    """A task, as far as its name and dataset are known, and its faults."""
    from .specs import TaskSpec

    found = list(faults(entry))
    sound = {key: value for key, value in entry.items() if key not in dict(found)}
    through, unsound = _through(sound)
    found += unsound
    if not {"name", "dataset"} <= sound.keys():
        return None, found
    if {"columns", "template", "templates", *NEED_TEMPLATE} & dict(found).keys():
        through = _any_row
    spec = TaskSpec.of(sound["name"].strip(), sound["dataset"])
    spec = replace(spec, split=sound.get("split", spec.split), config=sound.get("config"), through=through)
    measure = sound.get("measure", True)
    if isinstance(measure, str):
        measure = replace(TaskSpec.of(spec.name, measure), config=spec.config, through=through)
    role, streaming = sound.get("role", "learn"), sound.get("streaming", False)
    metric = None if through is _any_row else sound.get("metric")
    return TaskConfig(spec, role, sound.get("share"), metric, measure, streaming, entry), found


def _through(entry: dict[str, Any]) -> tuple[Any, list[Fault]]:
    """What rows go through, if anything, and faults in the syntax of templates."""
    from .templates import Expression, Rendering, Template, renaming

    found: list[Fault] = []

    def compiled(key: str, place: str = "", kind: type[Template] = Template, text: str = "") -> Template | None:
        try:
            return kind(text or entry[key], f"{key}{place}")
        except ValueError as error:
            found.append((key, str(error)))
            return None

    def each(key: str) -> tuple[Template | None, ...]:
        return tuple(compiled(key, f"[{i}]", text=text) for i, text in enumerate(entry[key]))

    columns = tuple(entry.get("columns", {}).items())
    if not entry.keys() & {"template", "templates"} or "completion" not in entry:
        return renaming(columns) if columns else None, found
    templates = each("templates") if "templates" in entry else (compiled("template"),)
    choices = entry.get("choices")
    if choices is not None:
        choices = each("choices") if isinstance(choices, list) else compiled("choices", kind=Expression)
    rendering = Rendering(templates, compiled("completion"), choices, entry.get("chat", True), columns)
    return rendering.of, found


def _any_row(seed: int) -> Any:
    """For a task whose templates are at fault: its file is read all the same, for what else is wrong with it."""
    return lambda row: {"text": "."}


def _apart(task: TaskConfig, before: list[TaskConfig], number: int) -> TaskConfig:
    """Of two tasks with one name, which is a fault, the later one under another, so that both can be looked at."""
    twice = task.name.casefold() in [other.name.casefold() for other in before]
    return replace(task, spec=replace(task.spec, name=f"{task.name} ({number + 1})")) if twice else task


def _names(tasks: list[TaskConfig]) -> Iterator[str]:
    from .specs import distinct_names

    try:
        distinct_names(task.name for task in tasks)
    except UsageError as error:
        yield f"tasks: {error}"
    for task in tasks:
        if task.role == "protect" and task.name == "learn":
            yield "tasks.learn: protects, but 'learn' is what new data is called; give it another name"


def _streams(tasks: list[TaskConfig]) -> list[str]:
    """Streams and rows that are held cannot be drawn from together."""
    streamed, held = ([task for task in tasks if task.role == "learn" and task.streaming is it] for it in (True, False))
    if not streamed or not held:
        return []
    names = [", ".join(escape(task.name) for task in found) for found in (streamed, held)]
    return [f"tasks: {names[0]} is streamed, {names[1]} is not; expected all learn tasks or none: streaming: true"]


def join(tasks: list[TaskConfig], protect: list[TaskSpec], measure: list[TaskSpec]) -> None:
    """Add what the tasks protect and measure to what the command line does.

    Raises:
        UsageError: a name that both have.
    """
    from .specs import TaskSpec, distinct_names

    names = [task.name for task in tasks]
    distinct_names([*names, *(spec.name for spec in protect)])
    for spec in measure if tasks else ():
        if spec.name in [*names, "learn"]:
            raise UsageError(
                f"--measure {escape(str(spec))}: what is learnt and protected is declared under tasks "
                f"({', '.join(map(escape, names))}). Write measure: DATA there, or give this another name."
            )
    protect += [task.spec for task in tasks if task.role == "protect"]
    measure += [task.measure for task in tasks if isinstance(task.measure, TaskSpec)]


# ---- shares ----------------------------------------------------------------------------------------------------------


def _shares(tasks: list[TaskConfig], whole: bool) -> Iterator[str]:
    """Shares that sum to more than there is, or (if these are the whole of the tasks) leave some of it to nobody."""
    given = {task.name: task.share for task in tasks if task.share is not None}
    learn = [task.name for task in tasks if task.role == "learn"]
    total, free = sum(given.values()), [name for name in learn if name not in given]
    said = f"tasks: their shares ({', '.join(f'{escape(name)} {share:g}' for name, share in given.items())}) sum to "
    if tasks and not learn and whole:
        yield "tasks: none has the role learn; expected one or more to learn from"
    elif total > 1 + ROUNDING:
        yield f"{said}{total:g}; expected 1 or less"
    elif not given or not whole:
        return
    elif free and total > 1 - ROUNDING:
        yield f"{said}1 and leave nothing for {', '.join(map(escape, free))}; expected less, or a share for each"
    elif not free and total < 1 - ROUNDING:
        yield f"{said}{total:g}; expected 1, or a learn task without a share, which takes the rest"


def refuse_shares(tasks: list[TaskConfig], strategies: list[Strategy]) -> None:
    """Raise where a strategy shares out what tasks have claimed.

    Raises:
        UsageError: names the strategy and the tasks, and says what to remove.
    """
    for strategy, role in (("multitask", "learn"), ("replay", "protect")):
        claimed = [task.name for task in tasks if task.role == role and task.share is not None]
        if claimed and strategy in [item.name for item in strategies]:
            raise UsageError(
                f"{strategy} shares out training between {role} tasks itself, and a share is given to "
                f"{', '.join(map(escape, claimed))}. Remove --plugin {strategy}, or share from these tasks."
            )
