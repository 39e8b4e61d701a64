"""What a plugin must be: hooks that pluggy knows, dataclasses as strategies, settings that explain themselves.

Each module that is asked gets a pluggy manager of its own, so that a broken one cannot leave half of itself behind
(`load_setuptools_entrypoints` has no such isolation).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy

from . import hookspecs
from .errors import PluginError, UsageError, nearest
from .strategy import Strategy, settings

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
HOOKS = tuple(name for name in vars(Strategy) if not name.startswith("_") and callable(getattr(Strategy, name)))
KNOWN = tuple(name for name in vars(hookspecs) if name.startswith("ftplus_"))


def ask(module: Any, who: str) -> list[type[Strategy]]:
    """What the hook of one module returns, validated; an empty list when it has none.

    Raises:
        PluginError: a misspelt or unmarked hook, or a result that is not a list of strategy classes.
    """
    check_api(getattr(module, "ftplus_api", None), who)
    _check_spelling(module, who)
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name=who)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{who} breaks the plugin contract: {say(error)}. See hf_ftplus/hookspecs.py.") from error
    result: list[type[Strategy]] = []
    for answer in manager.hook.ftplus_strategies():
        if not isinstance(answer, (list, tuple)):
            raise PluginError(f"{who}: ftplus_strategies() returned {answer!r}; expected a list of strategy classes.")
        result += [validate(item, who) for item in answer]
    twice = {item.name for item in result if [other.name for other in result].count(item.name) > 1}
    if twice:
        raise PluginError(f"{who} offers two strategies named {', '.join(sorted(twice))}; expected each name once.")
    return result


def written_for(value: str) -> int | None:
    """What the module of an entry point says in its `ftplus_api = N`, read without importing it; packages that it lies
    in are imported to find it.
    """
    name = value.partition(":")[0].strip()
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    said = re.search(r"^ftplus_api *(?:: *\w+ *)?= *(\d+)", Path(spec.origin).read_text(encoding="utf-8"), re.M)
    return int(said[1]) if said else None


def check_api(written_for: Any, who: str) -> None:
    """Refuse what was written for another contract. A module that does not say is taken to fit."""
    if written_for in (None, hookspecs.API):
        return
    from . import __version__

    if not isinstance(written_for, int):
        cure = f"Write ftplus_api = {hookspecs.API}."
    elif written_for > hookspecs.API:
        cure = f"Install a newer {hookspecs.HOST}."
    else:
        cure = f"Look for a newer version of it, or install an older {hookspecs.HOST}."
    raise PluginError(
        f"{who} is written for plugin API {written_for!r}; {hookspecs.HOST} {__version__} speaks {hookspecs.API}. "
        f"{cure}"
    )


def _check_spelling(module: Any, who: str) -> None:
    """pluggy sees marked functions only; a function that was meant to be a hook must not be passed over in silence."""
    for name, item in vars(module).items():
        marked = hasattr(item, f"{hookspecs.GROUP}_impl")
        if name in KNOWN and callable(item) and not marked and not hasattr(item, f"{hookspecs.GROUP}_spec"):
            raise PluginError(
                f"{who}: {name} is not marked; write @hookimpl above it (from hf_ftplus import hookimpl)."
            )
        if name not in KNOWN and (marked or (name.startswith("ftplus_") and inspect.isfunction(item))):
            raise PluginError(f"{who} has an unknown hook {name!r}.{nearest(name, KNOWN)} Hooks: {', '.join(KNOWN)}.")


def validate(item: Any, who: str) -> type[Strategy]:
    """The class, if it keeps the contract of `strategy.py`.

    Raises:
        PluginError: what it breaks, and how to mend it.
    """
    if not (isinstance(item, type) and issubclass(item, Strategy)) or item is Strategy:
        raise PluginError(f"{who} offers {item!r}; expected a subclass of hf_ftplus.Strategy.")
    where = f"{who}, class {item.__name__}"
    if "__dataclass_params__" not in vars(item):
        raise PluginError(f"{where}: not a dataclass; write @dataclass above it.")
    if not isinstance(item.name, str) or not NAME.fullmatch(item.name):
        raise PluginError(
            f"{where}: name is {item.name!r}; expected lower-case letters, digits, - and _, as in "
            "name: ClassVar[str] = 'l2sp'."
        )
    _check_settings(item, where)
    _check_methods(item, where)
    return item


def _check_settings(item: type[Strategy], where: str) -> None:
    for one in dataclasses.fields(item):
        if one.init and "setting" not in one.metadata:
            raise PluginError(
                f"{where}: field {one.name!r} is not a setting; write {one.name}: ... = setting(..., 'help')."
            )
    try:
        declared = settings(item)
    except (NameError, TypeError) as error:
        raise PluginError(f"{where}: the types of its settings cannot be read: {say(error)}.") from error
    for one in declared:
        if not isinstance(one.help, str) or not one.help.strip():
            raise PluginError(f"{where}: setting {one.name!r} has no help; say what it does to the user's result.")
        try:
            one.check(one.default, item.name)
        except UsageError as error:
            raise PluginError(f"{where}: the default of a setting is not allowed by itself: {error}") from error


def _check_methods(item: type[Strategy], where: str) -> None:
    for parent in item.__mro__[: item.__mro__.index(Strategy)]:
        for name, method in vars(parent).items():
            if name in HOOKS:
                _check_signature(name, method, where)
                _announce(name, method)
            elif not name.startswith("_") and inspect.isfunction(method):
                close = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.8)  # `state` is no misspelt `state_dict`
                if close and close != ["overrides"]:  # which the host asks, and nobody writes
                    raise PluginError(
                        f"{where}: {name}() is no hook. Did you mean {close[0]!r}? Else give it a leading _."
                    )


def _check_signature(name: str, method: Callable[..., Any], where: str) -> None:
    wanted = inspect.signature(getattr(Strategy, name))
    try:
        inspect.signature(method).bind(*wanted.parameters)
    except TypeError as error:
        raise PluginError(
            f"{where}: {name} takes other arguments than {name}({', '.join(wanted.parameters)})."
        ) from error


_announced: dict[Any, Any] = {}
"""What `warnings` has said once."""


def _announce(name: str, method: Any) -> None:
    """Warn, at the author's own line and once, of a moment that the next number of the contract drops."""
    if name in hookspecs.LEAVING and inspect.isfunction(method):
        warnings.warn_explicit(
            f"plugin API {hookspecs.API + 1} will drop {name}(); override {hookspecs.LEAVING[name]}() instead",
            DeprecationWarning,
            method.__code__.co_filename,
            method.__code__.co_firstlineno,
            registry=_announced,
        )


def say(error: BaseException) -> str:
    """An exception on one line: `ModuleNotFoundError: No module named 'x'`."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
