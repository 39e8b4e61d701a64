"""What a sequence will do: its YAML read into stages, each with all that `ftplus sft --config` would be given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig, merge, read_yaml
from ..errors import FTPlusError, UsageError, nearest
from ..files import is_local
from ..specs import distinct_names, parse_all
from ..tasks import TaskConfig
from ..tasks import read as read_tasks
from .gathered import Gathered, gather, refuse_namesakes

OWN = ("stages", "keep")
"""Keys above those of `ftplus sft`."""
KEEP = 64
MERGED = "merged"
"""Where a stage that trained an adapter leaves it within its base."""
ALIKE = ("output_dir", "measure_rows", "env", *OWN)
"""Keys that cannot differ between stages: figures of other rows could not stand in one matrix."""
GIVEN = {"model_name_or_path": "the model of the stage before", "memory": "the memory of the stage before"}
"""What later stages start with, and from where."""
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")


@dataclass
class Stage:
    """One run of the sequence."""

    number: int
    name: str
    folder: Path
    yaml: dict[str, Any]
    """The shared keys, overlaid by those of the stage."""
    own: set[str] = field(default_factory=set)
    """The keys that stand in the stage itself."""
    tasks: list[TaskConfig] = field(default_factory=list)
    remembers: list[str] = field(default_factory=list)
    """Strategies that are given their memory of the stage before."""
    rests: list[str] = field(default_factory=list)
    """Strategies that only wait, or record: there is nothing to protect yet."""
    config: RunConfig | None = None
    """As far as it is known before the stage before has run."""
    seen: dict[str, str] = field(default_factory=dict)
    """Digests of its data when all stages were checked, until it begins; not of rows that stages before will keep."""

    @property
    def file(self) -> Path:
        """What it is told, for `ftplus sft --config`."""
        return self.folder / "ftplus" / "stage.yaml"

    @property
    def report(self) -> Path:
        return self.folder / "ftplus" / "report.json"

    @property
    def measured_as(self) -> str:
        """The name of its task in its own report; of several learn tasks none is `learn`."""
        return self.name if self.tasks else "learn"


@dataclass
class Plan:
    """All stages, and what they share."""

    out: Path
    keep: int
    """Rows kept of every finished task."""
    stages: list[Stage] = field(default_factory=list)
    measure: dict[str, str] = field(default_factory=dict)
    """Every task that is measured in all stages, with its data: those of the stages first, in their order."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Of those that have one of their own."""
    gathered: dict[str, Gathered] = field(default_factory=dict)
    """Of these what comes from the `tasks:` of a stage."""
    incomparable: set[str] = field(default_factory=set)
    """Measured against what each stage's starting model says: nothing for the matrix."""
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        """What is written while it runs: rows kept of stages, and rows that all measure."""
        return {str(self.pool(stage)) for stage in self.stages} | {str(it.file) for it in self.gathered.values()}

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    @property
    def others(self) -> list[str]:
        """What is measured besides the stages' own tasks, and can be compared between stages."""
        return [name for name in self.measure if name not in self.names and name not in self.incomparable]

    def pool(self, stage: Stage) -> Path:
        """The file of the rows kept of it."""
        return self.out / "pools" / f"{stage.name}.jsonl"

    def before(self, stage: Stage) -> Stage | None:
        return self.stages[stage.number - 2] if stage.number > 1 else None

    def is_last(self, stage: Stage) -> bool:
        return stage.number == len(self.stages)


@contextmanager
def within(stage: Stage) -> Iterator[None]:
    """Put the name of the stage on whatever is wrong in it."""
    try:
        yield
    except FTPlusError as error:
        raise type(error)(f"Stage {stage.name!r}: {error}") from error


def read(source: str | Path | Mapping[str, Any]) -> Plan:
    """The plan of a YAML file or of a mapping with the same keys; nothing is loaded but the strategies.

    Raises:
        UsageError: an unknown key, name, strategy or setting, with the nearest known one; or stages that do not fit.
    """
    from ..cli.sft import configured, take_environment, yaml_keys  # TRL's own parser: the one room that knows it
    from .handover import look_back, stage_yaml

    given = _plain(source if isinstance(source, Mapping) else read_yaml(str(source), "ftplus sequence"))
    known = yaml_keys()
    _check_shared(given, known)
    stages = _stages(given, known)
    shared = take_environment({key: value for key, value in given.items() if key not in OWN})
    plan = Plan(Path(shared.pop("output_dir")).expanduser(), given.get("keep", KEEP))
    for number, item in enumerate(stages, 1):
        name = item.pop("name")
        plan.stages.append(Stage(number, name, plan.out / f"{number:02}-{name}", {**shared, **item}, set(item)))
        plan.stages[-1].tasks = _tasks(plan.stages[-1])
        shared.pop("memory", None)  # of an earlier run: it is of the first stage's model
        shared |= {key: item[key] for key in ("model_name_or_path",) if key in item}  # ... until a stage has left one
    _gather_measured(plan, shared)
    for stage in plan.stages:
        with within(stage):
            look_back(plan, stage)
            stage.config, _, _ = configured({}, (), stage_yaml(plan, stage))
            _check_measured(stage)
        if not stage.config.training.bf16 and not {"bf16", "fp16"} & stage.yaml.keys():
            for other in plan.stages:  # what this machine lacks is said once
                other.yaml.setdefault("bf16", False)
    return plan


def _tasks(stage: Stage) -> list[TaskConfig]:
    tasks, faults = read_tasks(stage.yaml.get("tasks"))
    if faults:
        with within(stage):
            raise UsageError("\n".join(faults))
    return tasks


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a YAML file, so that it can be compared with one."""
    try:
        return yaml.safe_load(yaml.safe_dump(_texts(given), sort_keys=False))
    except yaml.YAMLError as error:
        raise UsageError(f"The sequence holds a value that YAML cannot: {' '.join(str(error).split())}") from None


def _texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_texts(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_shared(given: dict[str, Any], known: list[str]) -> None:
    _check_keys(given, (*OWN, *known), "the YAML")
    out, keep = given.get("output_dir"), given.get("keep", KEEP)
    if not isinstance(out, str) or not out.strip():
        raise UsageError("There is no output_dir. Add one to the YAML: output_dir: out")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
        raise UsageError(f"keep: {keep!r}; expected the number of rows kept of every finished task, 0 for none.")


def _stages(given: dict[str, Any], known: list[str]) -> list[dict[str, Any]]:
    found = given.get("stages")
    if not isinstance(found, list) or not found:
        raise UsageError("There are no stages. Expected stages: and under it a list, each with a name and its data.")
    for number, item in enumerate(found, 1):
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == "learn":
            shown = f"the name {name!r}" if isinstance(item, dict) and name is not None else "no name"
            raise UsageError(
                f"Stage {number} has {shown}; expected letters, digits, '-', '_' and '.', fit for a folder, at most 64 "
                "of them, as text, and not 'learn'. Type - name: reviews"
            )
        for key in ALIKE:
            if key in item:
                raise UsageError(f"Stage {name!r} has {key}, which is one for all stages: put it above stages:.")
        for key in GIVEN if number > 1 else ():
            if key in item:
                raise UsageError(f"Stage {name!r} has {key}, but it starts from {GIVEN[key]}. Leave it out.")
        _check_keys(item, ("name", *known), f"stage {name!r}")
    distinct_names(item["name"] for item in found)
    return [dict(item) for item in found]


def _check_keys(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise UsageError(f"Unknown key {key!r} in {where}.{nearest(str(key), known)} See `ftplus sft --help-all`.")
    if "resume_from_checkpoint" in given:
        raise UsageError(
            "resume_from_checkpoint: a sequence goes on by itself. Leave it out and type the same command."
        )


# ---- what is measured ------------------------------------------------------------------------------------------------


def _gather_measured(plan: Plan, shared: dict[str, Any]) -> None:
    """Everything that any stage measures, and its metric: all stages measure all of it."""
    given: dict[str, str] = {}
    for names, keys in [(plan.names, shared), *(([stage.name], stage.yaml) for stage in plan.stages)]:
        ours, _ = merge({}, {key: keys[key] for key in ("measure", "metric") if key in keys})
        for spec in parse_all(ours.get("measure", ())):
            if spec.name == "learn" and keys is shared:
                raise UsageError(f"measure: learn stands above stages:. Say of which: measure: {{{names[0]}: DATA}}")
            task, data = names[0] if spec.name == "learn" else spec.name, str(spec).partition("=")[2]
            if given.setdefault(task, data) != data:
                raise UsageError(
                    f"{task!r} is measured on {given[task]} and on {data}; expected one, the same in every stage. Give "
                    "one of them another name: OTHER: DATA"
                )
        for text in ours.get("metric", ()):
            task, _, metric = text.partition("=")
            plan.metrics |= dict.fromkeys(names if task == "learn" else [task], metric)
    for stage in plan.stages:
        with within(stage):
            _refuse_own_name(stage)
            gather(plan, stage, given)
            own = plan.gathered.get(stage.name)
            data = given.pop(stage.name, "") or (str(own.file) if own else "")
            plan.measure[stage.name] = data or _trained_rows(plan, stage)
    for stage in plan.stages:
        with within(stage):
            refuse_namesakes(plan, stage)
    plan.measure |= given | {name: str(it.file) for name, it in plan.gathered.items()}
    plan.metrics = {task: metric for task, metric in plan.metrics.items() if task in plan.measure}


def _refuse_own_name(stage: Stage) -> None:
    """A stage with `tasks:` is measured under its name, and each of them under its own."""
    if stage.name in [task.name for task in stage.tasks]:
        raise UsageError(
            f"One of its tasks has the name of the stage, which is that of all of them together. Give the stage "
            f"another. Type - name: {stage.name}-stage"
        )


def _trained_rows(plan: Plan, stage: Stage) -> str:
    """Where there is no held-out data, a task is measured on what it was learnt from."""
    source, split = stage.yaml.get("dataset_name"), stage.yaml.get("dataset_train_split", "train")
    if not source or any(stage.yaml.get(key) for key in ("tasks", "datasets", "dataset_config", "dataset_streaming")):
        each = ", or measure: DATA to each of its tasks" if stage.tasks else ""
        raise UsageError(f"There is nothing to measure it on. Add held-out rows: measure: {{{stage.name}: DATA}}{each}")
    plan.notes.append(f"{stage.name} is measured on trained rows; for held-out ones: measure: {{{stage.name}: DATA}}.")
    return str(source) if split == "train" and is_local(str(source)) else f"{source}:{split}"


def _check_measured(stage: Stage) -> None:
    if not stage.config.measure_rows:
        raise UsageError("measure_rows is 0, so there would be no matrix. Expected 1 or more.")
    if any(spec.generate for spec in stage.config.measure if spec.name == stage.measured_as):
        raise UsageError(f"measure: {stage.name} is text that each stage's model writes itself; expected rows of it.")
