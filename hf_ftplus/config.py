"""One run, resolved: what the user asked of us on the command line and in YAML, in one validated object.

TRL's own arguments (model, data, training) are read by TRL's own parser in `cli/sft.py`; here is what we add. Flags win
over YAML, YAML over defaults. Each option is declared once, in `OPTIONS`: help, YAML key and validation read it there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import conditions, metric
from .chosen import plugins_of, strategies
from .errors import UsageError, nearest
from .strategy import Memory

if TYPE_CHECKING:
    from .specs import TaskSpec
    from .strategy import Strategy
    from .tasks import TaskConfig

_KINDS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Option:
    """One option of ours: `--name VALUE` on the command line, `key: value` in YAML."""

    name: str
    help: str
    many: bool = False
    kind: type = str
    metavar: str | None = None
    key: str = ""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def yaml(self) -> str:
        return self.key or self.name


OPTIONS = (
    Option(
        "plugin",
        "A strategy: its name, or ./file.py. Repeatable; called in this order.",
        True,
        metavar="NAME",
        key="plugins",
    ),
    Option("set", "A setting: ewc.strength=30000. Repeatable.", True, metavar="NAME.SETTING=VALUE"),
    Option("no_plugin", "Never load this installed plugin. Repeatable.", True, metavar="NAME"),
    Option(
        "protect",
        "What must not be forgotten: a file, a Hub name, self:256, or self:256x48 (answers of 48 tokens). Repeatable.",
        True,
        metavar="[NAME=]DATA[:SPLIT]",
    ),
    Option(
        "measure",
        "Measured before and after, never trained on; learn=DATA is held-out learn data. Repeatable.",
        True,
        metavar="[NAME=]DATA[:SPLIT]",
    ),
    Option(
        "metric",
        "How a task is scored: choice, exact_match, f1, rouge; exact_match:REGEX finds the answer. Repeatable.",
        True,
        metavar="TASK=METRIC",
    ),
    Option(
        "memory",
        "Of an earlier run, whose knowledge still counts: OUTPUT/ftplus/memory, or OUTPUT itself, or what `ftplus "
        "memory pull` fetched.",
        metavar="DIR",
    ),
    Option(
        "measure_rows",
        "Rows per task that are measured before and after; 0 measures nothing.  [64]",
        kind=int,
        metavar="N",
    ),
    Option("completions", "Completions per task shown side by side, before and after.  [3]", kind=int, metavar="N"),
    Option(
        "stop_when",
        "End training early: learn-plateaus[:PATIENCE[:NATS]], or 'retention-falls-below X'. Repeatable.",
        True,
        metavar="CONDITION",
    ),
    Option(
        "fail_if_retention_below",
        "Exit with 5 if any protect task keeps less than this share.",
        kind=float,
        metavar="X",
    ),
)
OVERLAID = ("set", "metric")
"""NAME=VALUE: a flag replaces what the file says of that name, and leaves the others."""
YAML_ONLY = ("tasks",)
MOST_YAML = 100_000
"""Values in a YAML file, anchors written out."""
DEFAULTS = {"measure_rows": 64, "completions": 3}
SECRETS = ("hub_token", "push_to_hub_token", "token", "use_auth_token")
"""Left out of the report wherever they stand; an eos_token is none."""


@dataclass
class RunConfig:
    """Everything `run.sft` needs. `training`, `model`, `script` and `mixture` are TRL's own argument objects."""

    training: Any = None
    model: Any = None
    script: Any = None
    mixture: Any = None
    strategies: list[Strategy] = field(default_factory=list)
    protect: list[TaskSpec] = field(default_factory=list)
    measure: list[TaskSpec] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    tasks: list[TaskConfig] = field(default_factory=list)
    """As declared in YAML; `protect`, `measure` and `metrics` have their part of them, too."""
    memory: Path | None = None
    measure_rows: int = DEFAULTS["measure_rows"]
    completions: int = DEFAULTS["completions"]
    fail_if_retention_below: float | None = None
    stop_when: list[str] = field(default_factory=list)
    go_on: str = "the same command and --resume_from_checkpoint true"
    """What to type after Ctrl-C."""

    @property
    def learns(self) -> list[str]:
        """The names of what is learnt."""
        return [task.name for task in self.tasks if task.role == "learn"] or ["learn"]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of training rows that tasks are given."""
        return {task.name: task.share for task in self.tasks if task.share is not None}

    @property
    def unmeasured(self) -> list[str]:
        return [task.name for task in self.tasks if task.measure is False]

    def resolved(self) -> dict[str, Any]:
        """All of it as plain values for the report; secrets left out."""
        given = vars(self.training)  # to_dict masks whatever ends with _token, the eos_token too
        training = {key: given.get(key, value) for key, value in self.training.to_dict().items()}
        everything = {
            "strategies": [repr(strategy) for strategy in self.strategies],
            "protect": [str(spec) for spec in self.protect],
            "measure": [str(spec) for spec in self.measure],
            "metrics": self.metrics,
            "tasks": [task.given for task in self.tasks],
            "memory": str(self.memory) if self.memory else None,
            "measure_rows": self.measure_rows,
            "completions": self.completions,
            "fail_if_retention_below": self.fail_if_retention_below,
            "stop_when": self.stop_when,
            "model": vars(self.model),
            "data": vars(self.script),
            "mixture": vars(self.mixture),
            "training": training,
        }
        return without_secrets(everything)


def without_secrets(value: Any) -> Any:
    """For what is kept on disk, where a push to the Hub would take it along."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items() if key not in SECRETS}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value


def read_yaml(path: str | None, what: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file, called `what` in errors; empty without a path.

    Raises:
        UsageError: the file is missing, is not YAML, or is not a mapping; names line and column.
    """
    import yaml

    if path is None:
        return {}
    text = ""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}; expected a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of the 13th month, ten thousand brackets
        said = f"{what} {path} is not YAML: {' '.join(str(error).split())}"
        raise UsageError(said + (" Put templates in quotes." if "{{" in str(text) else "")) from None
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UsageError(f"{what} {path} {found}; expected a mapping of option: value.")
    refuse_twice(text, path)
    return content


def refuse_twice(text: str, path: str) -> None:
    """Raise for a key that stands twice in one mapping: YAML would keep the last in silence.

    Raises:
        UsageError: names the key and its line.
    """
    import yaml

    from .task_keys import shown

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found, seen_nodes = [root], set()
    refuse_bomb(root, path)
    while found:
        node = found.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    line = key.start_mark.line + 1
                    raise UsageError(f"{path}:{line}: {shown(key.value)} stands twice in one mapping; expected once.")
                seen.add(str(key.value))
                found.append(value)
        elif isinstance(node, yaml.SequenceNode):
            found += node.value


def refuse_bomb(root: Any, path: str) -> None:
    """Raise for anchors that hold themselves, or that stand for more than anybody writes.

    Raises:
        UsageError: names the line of the anchor.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_YAML + 1  # until it is known: what holds itself is too large
            inside = node.value if isinstance(node.value, list) else ()
            parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
        if sizes[id(node)] > MOST_YAML:
            line = node.start_mark.line + 1
            raise UsageError(
                f"{path}:{line}: an anchor (&) holds itself, or too much; expected at most {MOST_YAML:,} values."
            )
        return sizes[id(node)]

    size(root)


def merge(flags: dict[str, Any], yaml: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options out of flags and YAML, flags winning; and what is left of the YAML, TRL's or accelerate's."""
    rest = dict(yaml)
    ours: dict[str, Any] = dict(DEFAULTS)
    for option in OPTIONS:
        given = rest.pop(option.yaml, None)
        if option.name == "plugin":
            ours["plugin"], ours["settings"] = plugins_of(given)
            if flags.get("plugin"):  # instead of the file's; its settings stay for those that are named again
                ours["settings"] = {
                    name: values for name, values in ours["settings"].items() if name in flags["plugin"]
                }
        elif given is not None:
            ours[option.name] = _listed(given) if option.many else _single(given, option)
        if flags.get(option.name) not in (None, ()):
            before = ours.get(option.name, ()) if option.name in OVERLAID else ()
            ours[option.name] = [*before, *flags[option.name]] if option.many else flags[option.name]
    ours["tasks"] = rest.pop("tasks", None)
    if flags.get("measure") and yaml.get("measure") and yaml.get("metric"):
        ours["metric"] = [*_still_asked(ours, yaml), *flags.get("metric", ())]
    return ours, rest


def _still_asked(ours: dict[str, Any], yaml: dict[str, Any]) -> Iterator[str]:
    """The file's metrics, less those of tasks that it measures and a flag measures others instead of."""
    from .specs import parse_all

    before = {spec.name for spec in parse_all(_listed(yaml["measure"]))}
    still = {"learn", *(spec.name for key in ("measure", "protect") for spec in parse_all(ours.get(key, ())))}
    for text in _listed(yaml["metric"]):
        if text.partition("=")[0] not in before - still:
            yield text


def build(ours: dict[str, Any]) -> RunConfig:
    """Our half of a run, validated before TRL is imported or a model loaded; TRL's half is filled in later.

    Raises:
        UsageError: unknown strategy, setting, task or metric, or a value out of range; with the nearest known word.
    """
    from .specs import parse_all
    from .tasks import join, read, refuse_shares

    tasks, faults = read(ours.get("tasks"))
    if faults:
        raise UsageError("\n".join(faults))
    protect, measure = parse_all(ours.get("protect", ())), parse_all(ours.get("measure", ()))
    if any(spec.name == "learn" for spec in protect):
        raise UsageError("A protect task is called 'learn', the name of the new data. Name it: --protect OTHER=DATA.")
    join(tasks, protect, measure)
    chosen = strategies(ours)
    refuse_shares(tasks, chosen)
    gate = ours.get("fail_if_retention_below")
    if gate is not None and (not 0 < gate < float("inf") or 1 < gate <= 100):  # more closes always: to try an alarm
        meant = f" {gate:g} looks like percent: type {gate / 100:g}." if 1 < gate <= 100 else ""
        raise UsageError(f"--fail-if-retention-below {gate:g}; expected a share above 0 and up to 1.{meant}")
    config = RunConfig(
        strategies=chosen,
        protect=protect,
        measure=measure,
        tasks=tasks,
        memory=_memory(ours.get("memory")),
        measure_rows=_not_negative(ours["measure_rows"], "measure_rows"),
        completions=_not_negative(ours["completions"], "completions"),
        fail_if_retention_below=gate,
        stop_when=ours.get("stop_when", []),
    )
    known = list(dict.fromkeys([*config.learns, *(spec.name for spec in (*protect, *measure))]))
    typed = metrics_of(ours.get("metric", ()), known)
    config.metrics = {task.name: task.metric for task in tasks if task.metric} | typed
    judges = ["--fail-if-retention-below"] if gate is not None else []
    judges += [f"--stop-when {conditions.RETENTION}"] if conditions.read(config.stop_when).retention is not None else []
    for judge in judges:
        if config.measure_rows == 0:
            raise UsageError(f"{judge} needs a measurement, but --measure-rows is 0.")
        if all(spec.name in config.unmeasured for spec in protect):
            raise UsageError(f"{judge} has no protect task to judge. Type --protect DATA or self:256.")
    return config


def metrics_of(texts: Iterable[str], tasks: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        task, equals, name = text.partition("=")
        if not equals:
            raise UsageError(f"--metric {text!r}; expected TASK=METRIC with METRIC one of {', '.join(metric.METRICS)}.")
        metric.parse(name, f"--metric {text!r}")
        if task not in tasks:
            raise UsageError(f"--metric {text!r}: no task {task!r}.{nearest(task, tasks)} Tasks: {', '.join(tasks)}.")
        found[task] = name
    return found


def _memory(path: Any) -> Path | None:
    if path is None:
        return None
    folder = Memory.at(str(path))
    if not os.path.isfile(folder / "manifest.json"):
        found = "holds no manifest.json" if os.path.isdir(folder) else "is no folder"
        raise UsageError(f"--memory {path} {found}; expected OUTPUT/ftplus/memory of a finished run.")
    return folder


def _not_negative(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"--{name} {value!r}; expected a whole number of 0 or more.")
    return value


def _listed(given: Any) -> list[str]:
    """A list, one value, or a mapping of NAME to DATA."""
    if isinstance(given, dict):
        return [f"{name}={value}" for name, value in given.items()]
    return [str(item) for item in (given if isinstance(given, list) else [given])]


def _single(given: Any, option: Option) -> Any:
    """One value in the option's own type, without loss: 3.7 is no whole number, and `yes` is none either."""
    try:
        value = option.kind(given)
        if isinstance(given, bool) or (isinstance(given, float) and value != given):
            raise ValueError(given)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{option.yaml}: {given!r} in YAML; expected {_KINDS[option.kind]}.") from None
    return value
