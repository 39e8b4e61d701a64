"""Which strategies were asked for, with which settings: `plugins:` in YAML, --plugin and --set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from .strategy import Strategy


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
        given = settings.pop(name, {})
        strategy = resolve((name, given), blocked=tuple(ours.get("no_plugin", ())))
        late = settings.pop(strategy.name, None)  # settings go by the strategy's name even when a file was given
        found[strategy.name] = resolve((type(strategy), given | late)) if late else strategy
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
        raise UsageError(f"--set {text!r}; expected NAME.SETTING=VALUE, such as ewc.strength=30000.")
    return name, setting, value.strip()


def plugins_of(given: Any) -> tuple[list[str], dict[str, dict[str, Any]]]:
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
                    f"plugins: {item!r}; expected a name, or a name with its settings: ewc: {{strength: 30000}}."
                )
            names.append(name)
            settings[name] = dict(values or {})
    return names, settings
