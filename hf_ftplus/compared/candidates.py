"""What is compared: candidates as they are typed, and the rows of the table that settings make of them.

    none                        plain fine-tuning, once for each learning rate
    ewc                         a strategy, once for each of --strengths
    ewc:strength=100            with a setting of its own, which --strengths then leaves alone; `:` before each
    replay+distill              strategies together, in this order; strengths move together

The name of a row is such a text, too, and makes the same row when it is typed (a strategy of a ./file.py goes there by
its own name).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, nearest

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..strategy import Strategy

NONE = "none"
RATE = "learning_rate"
SWEEP = (0.25, 0.5, 1.0)
"""Learning rates of plain fine-tuning, times that of the config: a lower one forgets less, and costs nothing."""
STRENGTHS = (0.1, 1.0, 10.0)
"""`auto`: times the strategy's own."""
NEXT = re.compile(r"\+(?=[A-Za-z_.~/])")
"""Between two strategies; the plus of 1e+3 is none."""
PART = re.compile(r":(?=[A-Za-z_]\w*=)")
"""Before a setting; the colon of `./file.py:Class` is none."""


@dataclass
class Row:
    """One candidate with all its settings: a line of the table, and a cell for each seed."""

    name: str
    learning_rate: float
    plugins: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """As under `plugins:` in YAML."""
    strategies: list[Strategy] = field(default_factory=list)


@dataclass
class Candidate:
    """One word of --plugins: names with settings as text; `rate` is that of `none:learning_rate=...`."""

    text: str
    parts: list[tuple[str, dict[str, str]]]
    rate: float | None = None


def rows(texts: Sequence[str], config: RunConfig, strengths: str | None, rates: str | None) -> list[Row]:
    """Every row that candidates, strengths and learning rates make.

    Args:
        texts: of --plugins, each with one candidate or several between commas.
        config: the run that they change; settings of its strategies are those of candidates that say nothing else.

    Raises:
        UsageError: an unknown strategy or setting with the nearest known one, no candidate, or one that stands twice;
            strengths or learning rates that no candidate takes.
    """
    words = [word.strip() for text in texts for word in text.split(",")]
    if not all(words) or not words:
        raise UsageError("--plugins has an empty candidate; expected names between commas: --plugins none,ewc,replay")
    factors, levels = _strengths(strengths)
    swept = _numbers(rates, "--learning-rates") if rates else [float(f"{factor * _rate(config):g}") for factor in SWEEP]
    found: list[Row] = []
    candidates = [parse(word) for word in words]
    _refuse_idle(candidates, strengths, rates)
    for candidate in candidates:
        if candidate.parts:
            found += _of_strategies(candidate, config, factors, levels)
        else:
            found += [_plain(rate) for rate in ([candidate.rate] if candidate.rate else swept)]
    _refuse_twice(found)
    return found


def parse(word: str) -> Candidate:
    """`replay:share=0.2+ewc` as names and settings.

    Raises:
        UsageError: none beside a strategy, or a setting of none but its learning rate.
    """
    parts = []
    for text in NEXT.split(word):
        name, *given = PART.split(text)
        if not name or "=" in name:
            raise UsageError(f"--plugins {word!r}: {text!r}; expected a name, or NAME:SETTING=VALUE: ewc:strength=100")
        parts.append((name, dict(item.split("=", 1) for item in given)))
    if NONE not in [name for name, _ in parts]:
        return Candidate(word, parts)
    given = parts[0][1]
    if len(parts) > 1:
        raise UsageError(f"--plugins {word!r}: none is plain fine-tuning and stands alone. Leave none+ out.")
    if other := next((key for key in given if key != RATE), ""):
        hint = nearest(other, [RATE])
        raise UsageError(f"--plugins {word!r}: none has no setting {other!r}.{hint} It has {RATE} alone.")
    return Candidate(word, [], _positive(given[RATE], f"--plugins {word!r}") if given else None)


def _refuse_idle(candidates: list[Candidate], strengths: str | None, rates: str | None) -> None:
    """Raise for numbers that no candidate takes."""
    if strengths and not any(_movable(*part) for candidate in candidates for part in candidate.parts):
        raise UsageError(
            f"--strengths {strengths}: no candidate has a strength that is still to be set. Leave it out, or add one "
            "that has: --plugins none,ewc"
        )
    if rates and all(candidate.parts or candidate.rate for candidate in candidates):
        raise UsageError(
            f"--learning-rates {rates}: they are those of none, and no candidate is none without a rate of its own. "
            "Add none, or set learning_rate in the config for all."
        )


def _movable(name: str, given: dict[str, str]) -> bool:
    """Whether a strategy has a strength that the candidate leaves to --strengths."""
    from ..plugins import load
    from ..strategy import settings

    return "strength" not in given and "strength" in [item.name for item in settings(load(name))]


def _plain(rate: float) -> Row:
    return Row(f"{NONE}:{RATE}={_short(rate)}", rate)


def _of_strategies(
    candidate: Candidate, config: RunConfig, factors: Sequence[float], levels: Sequence[float]
) -> list[Row]:
    """One row; or one for each strength, of all strategies that have one and were not given theirs."""
    kept = {strategy.name: explicit(strategy) for strategy in config.strategies}
    base = [_resolved(name, given, kept) for name, given in candidate.parts]
    names = [strategy.name for strategy in base]
    if len(set(names)) < len(names):
        raise UsageError(f"--plugins {candidate.text!r}: a strategy stands twice. Give each once.")
    movable = [_movable(*part) for part in candidate.parts]
    steps = [(factor, None) for factor in factors] + [(1.0, level) for level in levels] if any(movable) else []
    found = []
    for factor, level in steps or [(1.0, None)]:
        chosen = []
        for strategy, (name, given), moves in zip(base, candidate.parts, movable, strict=True):
            values = dict(given)
            if moves and steps:
                values["strength"] = repr(
                    level if level is not None else float(f"{factor * usual(strategy, config):g}")
                )
            chosen.append((name, _resolved(name, values, kept), values))
        found.append(_row(chosen, _rate(config)))
    return found


def _row(chosen: list[tuple[str, Strategy, dict[str, str]]], rate: float) -> Row:
    words = []
    for _, strategy, values in chosen:
        said = "".join(f":{key}={_short(getattr(strategy, key))}" for key in values)
        words.append(strategy.name + said)
    plugins = [{name: explicit(strategy)} for name, strategy, _ in chosen]
    return Row("+".join(words), rate, plugins, [strategy for _, strategy, _ in chosen])


def _resolved(name: str, given: dict[str, str], kept: dict[str, dict[str, Any]]) -> Strategy:
    from ..plugins import load
    from ..strategy import configure

    strategy = load(name)
    return configure(strategy, {**kept.get(strategy.name, {}), **given})


def explicit(strategy: Strategy) -> dict[str, Any]:
    """The settings that are not the default."""
    return {
        item.name: getattr(strategy, item.name)
        for item in _settings(strategy).values()
        if getattr(strategy, item.name) != item.default
    }


def _settings(strategy: Strategy) -> dict[str, Any]:
    from ..strategy import settings

    return {item.name: item for item in settings(type(strategy))}


def usual(strategy: Strategy, config: RunConfig) -> float:
    """The strength that a strategy has when nothing is said.

    Raises:
        UsageError: it has no number of its own.
    """
    if found := strategy._usual_strength(bool(config.model.use_peft), bool(config.protect)):
        return found
    raise UsageError(
        f"--strengths auto: {strategy.name} has no strength above 0 to multiply. Type the numbers: --strengths 0.1,1,10"
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _strengths(text: str | None) -> tuple[Sequence[float], Sequence[float]]:
    """Factors of `auto`, or levels."""
    if text is None:
        return (), ()
    return (STRENGTHS, ()) if text.strip() == "auto" else ((), _numbers(text, "--strengths"))


def _numbers(text: str, flag: str) -> list[float]:
    found = [_positive(word, flag) for word in text.split(",")]
    if len(set(found)) < len(found):
        raise UsageError(f"{flag} {text}: a number stands twice. Give each once.")
    return found


def _positive(word: str, where: str) -> float:
    try:
        value = float(word)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(word)
    except ValueError:
        raise UsageError(f"{where}: {word.strip()!r}; expected numbers above 0 between commas, such as 0.1,1") from None
    return value


def _rate(config: RunConfig) -> float:
    return float(config.training.learning_rate)


def _short(value: Any) -> str:
    exact = isinstance(value, float) and float(f"{value:g}") == value
    return f"{value:g}" if exact else str(value)


def _refuse_twice(found: list[Row]) -> None:
    seen: dict[tuple[str, float], Row] = {}
    names: set[str] = set()
    for row in found:
        key = (repr(row.strategies), row.learning_rate)
        if key in seen or row.name in names:
            first = seen.get(key, row).name
            raise UsageError(f"--plugins has {row.name!r} twice (first as {first!r}). Give each candidate once.")
        seen[key] = row
        names.add(row.name)
