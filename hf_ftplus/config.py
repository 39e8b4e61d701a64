"""One run, resolved: what the user asked of us on the command line and in YAML, in one validated object.

TRL's own arguments (model, data, training) are read by TRL's own parser in `cli/sft.py`; here is what we add. Flags win
over YAML, YAML over defaults. Each option is declared once, in `OPTIONS`: help, YAML key and validation read it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from .data import TaskSpec
    from .strategy import Strategy

METRICS = ("choice", "exact_match")
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
    Option("set", "A setting: ewc.strength=3000. Repeatable.", True, metavar="NAME.SETTING=VALUE"),
    Option("no_plugin", "Never load this installed plugin. Repeatable.", True, metavar="NAME"),
    Option(
        "protect",
        "What must not be forgotten: a file, a Hub name, or self:256. Repeatable.",
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
        "metric", "How a task is scored beside loss: choice or exact_match. Repeatable.", True, metavar="TASK=METRIC"
    ),
    Option("memory", "OUTPUT/ftplus/memory of an earlier run, whose knowledge still counts.", metavar="DIR"),
    Option(
        "measure_rows", "Rows per task that are measured before and after; 0 measures nothing.", kind=int, metavar="N"
    ),
    Option("completions", "Completions per task shown side by side, before and after.", kind=int, metavar="N"),
    Option(
        "fail_if_retention_below",
        "Exit with 5 if any protect task keeps less than this share.",
        kind=float,
        metavar="X",
    ),
)
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
    memory: Path | None = None
    measure_rows: int = DEFAULTS["measure_rows"]
    completions: int = DEFAULTS["completions"]
    fail_if_retention_below: float | None = None

    def resolved(self) -> dict[str, Any]:
        """All of it as plain values for the report; secrets left out."""
        given = vars(self.training)  # to_dict masks whatever ends with _token, the eos_token too
        training = {key: given.get(key, value) for key, value in self.training.to_dict().items()}
        everything = {
            "strategies": [repr(strategy) for strategy in self.strategies],
            "protect": [str(spec) for spec in self.protect],
            "measure": [str(spec) for spec in self.measure],
            "metrics": self.metrics,
            "memory": str(self.memory) if self.memory else None,
            "measure_rows": self.measure_rows,
            "completions": self.completions,
            "fail_if_retention_below": self.fail_if_retention_below,
            "model": vars(self.model),
            "data": vars(self.script),
            "mixture": vars(self.mixture),
            "training": training,
        }
        return _without_secrets(everything)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if key not in SECRETS}
    return value


def read_yaml(path: str | None, what: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file, called `what` in errors; empty without a path.

    Raises:
        UsageError: the file is missing, is not YAML, or is not a mapping; names line and column.
    """
    import yaml

    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}; expected a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what} {path} holds a {type(content).__name__}; expected a mapping of option: value.")
    return content


def merge(flags: dict[str, Any], yaml: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options out of flags and YAML, flags winning; and what is left of the YAML, TRL's or accelerate's."""
    rest = dict(yaml)
    ours: dict[str, Any] = dict(DEFAULTS)
    for option in OPTIONS:
        given = rest.pop(option.yaml, None)
        if option.name == "plugin":
            ours["plugin"], ours["settings"] = _plugins(given)
            if flags.get("plugin"):  # instead of the file's; its settings stay for those that are named again
                ours["settings"] = {
                    name: values for name, values in ours["settings"].items() if name in flags["plugin"]
                }
        elif given is not None:
            ours[option.name] = _listed(given) if option.many else _single(given, option)
        if flags.get(option.name) not in (None, ()):
            ours[option.name] = list(flags[option.name]) if option.many else flags[option.name]
    return ours, rest


def build(ours: dict[str, Any]) -> RunConfig:
    """Our half of a run, validated before TRL is imported or a model loaded; TRL's half is filled in later.

    Raises:
        UsageError: unknown strategy, setting, task or metric, or a value out of range; with the nearest known word.
    """
    from .data import TaskSpec, distinct_names, parse_all

    protect, measure = parse_all(ours.get("protect", ())), [TaskSpec.parse(text) for text in ours.get("measure", ())]
    distinct_names(spec.name for spec in measure)
    if any(spec.name == "learn" for spec in protect):
        raise UsageError("A protect task is called 'learn', the name of the new data. Name it: --protect OTHER=DATA.")
    known = list(dict.fromkeys(["learn", *(spec.name for spec in (*protect, *measure))]))
    gate = ours.get("fail_if_retention_below")
    if gate is not None and not 0 < gate < float("inf"):
        raise UsageError(f"--fail-if-retention-below {gate}; expected a share above 0, such as 0.95.")
    if gate is not None and ours["measure_rows"] == 0:
        raise UsageError("--fail-if-retention-below needs a measurement, but --measure-rows is 0.")
    if gate is not None and not protect:
        raise UsageError("--fail-if-retention-below has no protect task to judge. Type --protect DATA or self:256.")
    return RunConfig(
        strategies=strategies(ours),
        protect=protect,
        measure=measure,
        metrics=_metrics(ours.get("metric", ()), known),
        memory=_memory(ours.get("memory")),
        measure_rows=_at_least(0, ours["measure_rows"], "measure_rows"),
        completions=_at_least(0, ours["completions"], "completions"),
        fail_if_retention_below=gate,
    )


def strategies(ours: dict[str, Any]) -> list[Strategy]:
    """The strategies asked for, with their settings from YAML and --set."""
    from .plugins import resolve

    settings: dict[str, dict[str, Any]] = {name: dict(values) for name, values in ours.get("settings", {}).items()}
    names = list(ours.get("plugin", ()))
    found = {}
    for text in ours.get("set", ()):
        name, setting, value = _assignment(text)
        settings.setdefault(name, {})[setting] = value
    for name in names:
        strategy = resolve((name, settings.pop(name, {})), blocked=tuple(ours.get("no_plugin", ())))
        late = settings.pop(strategy.name, None)  # settings go by the strategy's name even when a file was given
        found[strategy.name] = resolve((type(strategy), late)) if late else strategy
    if len(found) < len(names):
        raise UsageError(f"A strategy is given twice: {', '.join(names)}. Give each once.")
    for name in settings:
        raise UsageError(
            f"--set {name}.…: no strategy {name!r} in this run.{nearest(name, list(found))} Add --plugin {name}."
        )
    return list(found.values())


def _assignment(text: str) -> tuple[str, str, str]:
    path, equals, value = text.partition("=")
    name, dot, setting = path.strip().rpartition(".")
    if not (equals and dot and name and setting):
        raise UsageError(f"--set {text!r}; expected NAME.SETTING=VALUE, such as ewc.strength=3000.")
    return name, setting, value.strip()


def _metrics(texts: Iterable[str], tasks: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        task, equals, metric = text.partition("=")
        if not equals or metric not in METRICS:
            raise UsageError(
                f"--metric {text!r}; expected TASK=METRIC with METRIC one of {', '.join(METRICS)}."
                f"{nearest(metric, METRICS)}"
            )
        if task not in tasks:
            raise UsageError(f"--metric {text!r}: no task {task!r}.{nearest(task, tasks)} Tasks: {', '.join(tasks)}.")
        found[task] = metric
    return found


def _memory(path: Any) -> Path | None:
    if path is None:
        return None
    folder = Path(str(path)).expanduser()
    if not (folder / "manifest.json").is_file():
        inside = folder / "ftplus" / "memory"
        if (inside / "manifest.json").is_file():
            return inside
        raise UsageError(f"--memory {path} holds no manifest.json; expected OUTPUT/ftplus/memory of a finished run.")
    return folder


def _at_least(low: int, value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(f"--{name} {value!r}; expected a whole number of {low} or more.")
    return value


def _plugins(given: Any) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """`plugins:` in YAML: a name, a list of names or of `name: {settings}`, or a mapping of name to settings."""
    items = (
        []
        if given is None
        else given
        if isinstance(given, list)
        else list(given.items())
        if isinstance(given, dict)
        else [given]
    )
    names, settings = [], {}
    for item in items:
        pairs = item.items() if isinstance(item, dict) else [item] if isinstance(item, tuple) else [(item, None)]
        for name, values in pairs:
            if not isinstance(name, str) or not isinstance(values, (dict, type(None))):
                raise UsageError(
                    f"plugins: {item!r}; expected a name, or a name with its settings: ewc: {{strength: 3000}}."
                )
            names.append(name)
            settings[name] = dict(values or {})
    return names, settings


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
