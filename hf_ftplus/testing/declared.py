"""What a strategy says of itself to whoever judges it: `judged: ClassVar = {...}` in its class, written once.

    from_start   False: it is meant to act before any weight has moved (a loss on outputs, a projection)
    zero         settings that turn it off, where it is not `strength`, `share` or `weight` at 0
    finish       "moves": the last hook moves the weights, as averaging does
    second_run   True: in a first run it only records; judge it with the memory of one
    tasks        2 or more: learn rows of so many tasks, in a column `task`
    peft         False: judge it on full fine-tuning alone
    breaks       {law: reason}: it breaks this law knowingly; the reason is shown, and the law does not count

`ftplus plugin test`, `pytest --ftplus` and `check_strategy` read it. What is asked of them goes before it.
"""

from __future__ import annotations

from typing import Any

from ..errors import PluginError, nearest
from ..strategy import Strategy
from .laws import LAWS

FITS = {
    "from_start": (lambda value: isinstance(value, bool), "True or False"),
    "zero": (lambda value: isinstance(value, dict), "a dict of settings"),
    "finish": (lambda value: value in ("looks", "moves"), "'looks' or 'moves'"),
    "second_run": (lambda value: isinstance(value, bool), "True or False"),
    "tasks": (lambda value: isinstance(value, int) and value > 1, "a number of tasks, 2 or more"),
    "peft": (lambda value: isinstance(value, bool), "True or False"),
    "breaks": (lambda value: isinstance(value, dict) and all(map(_reasoned, value.items())), "{law: reason}"),
}
"""What may be declared, whether a value fits, and which do."""


def named() -> dict[str, Any]:
    """The laws by their names in words."""
    return {law.__name__.removeprefix("law_").replace("_", " "): law for law in LAWS}


def declared(kind: type[Strategy]) -> dict[str, Any]:
    """What a class declares.

    Raises:
        PluginError: something that cannot be declared, or not so.
    """
    found = kind.judged
    if not isinstance(found, dict):
        raise PluginError(f"{kind.__name__}.judged is {found!r}; expected a dict, as in {{'finish': 'moves'}}.")
    for key, value in found.items():
        if key not in FITS:
            known = list(FITS)
            raise PluginError(f"{kind.__name__}.judged has {key!r}.{nearest(key, known)} Known: {', '.join(known)}.")
        fits, expected = FITS[key]
        if not fits(value):
            raise PluginError(f"{kind.__name__}.judged[{key!r}] is {value!r}; expected {expected}.")
    for law in found.get("breaks", {}):
        if law not in named():
            known = list(named())
            raise PluginError(
                f"{kind.__name__}.judged['breaks'] names the law {law!r}.{nearest(law, known)} "
                f"Laws: {', '.join(known)}."
            )
    return found


def expected(strategy: Strategy, **asked: Any) -> dict[str, Any]:
    """How to judge a strategy, as `Bench` takes it: what is asked, else what its class declares; None asks nothing."""
    from .bench import rows_of

    found = {**declared(type(strategy)), **{key: value for key, value in asked.items() if value is not None}}
    tasks = found.pop("tasks", None)
    if tasks and found.get("learn") is None:
        found["learn"] = rows_of(tasks)
    return found


def _reasoned(item: tuple[Any, Any]) -> bool:
    law, reason = item
    return isinstance(law, str) and isinstance(reason, str) and bool(reason.strip())
