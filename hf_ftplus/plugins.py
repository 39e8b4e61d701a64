"""Find a strategy by its name or its file, and say what is installed, whatever else is broken.

Installed is not active: an entry point is imported when its name is asked for, and nothing here makes an object of a
class that was not. Only a name that no entry point has, and `discover`, import them all, each by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from . import hookspecs
from .contract import NAME, ask, check_api, say, validate, written_for
from .errors import FTPlusError, MissingPluginError, PluginError, UsageError, nearest
from .strategy import Strategy, configure

ALONE = "FTPLUS_DISABLE_PLUGIN_AUTOLOAD"
FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<pick>[\w-]+))?")

logger = logging.getLogger("hf_ftplus")


@dataclass(frozen=True)
class Plugin:
    """One row of `ftplus plugins`."""

    name: str
    distribution: str
    version: str
    status: str
    """`ok`, `blocked` or `failed`."""
    reason: str = ""
    strategies: dict[str, str] = field(default_factory=dict)
    """Each strategy that it offers, with one line of help."""

    @property
    def help(self) -> str:
        return self.strategies.get(self.name) or next(iter(self.strategies.values()), "")


@dataclass(frozen=True)
class Offer:
    """An entry point and who published it."""

    name: str
    value: str
    distribution: str
    version: str

    @property
    def full_name(self) -> str:
        return f"{self.distribution}:{self.name}"

    def answers_to(self, name: str) -> bool:
        """Whether `name` means this offer: `l2sp` or `ftplus-l2sp:l2sp`."""
        distribution, _, last = name.rpartition(":")
        return last == self.name and (not distribution or _canonical(distribution) == _canonical(self.distribution))

    def blocked_by(self, blocked: Collection[str]) -> bool:
        """Whether a `--no-plugin` names this offer or all of its distribution."""
        return any(self.answers_to(name) or _canonical(name) == _canonical(self.distribution) for name in blocked)


# ---- what a user calls -----------------------------------------------------------------------------------------------


def load(name_or_path: str, *, blocked: Collection[str] = ()) -> type[Strategy]:
    """The strategy class behind `ewc`, `distribution:ewc`, `./file.py` or `./file.py:Class`.

    Raises:
        UsageError: no such strategy, blocked, or claimed by two distributions.
        PluginError: it exists and cannot be loaded, or breaks the contract.
    """
    file = FILE.fullmatch(name_or_path)
    if file:
        found = _pick(load_file(Path(file["path"])), file["pick"], name_or_path)
        if any(offer.name == found.name for offer in offers() if _canonical(offer.distribution) == hookspecs.HOST):
            raise UsageError(f"{name_or_path} calls its strategy {found.name!r}, which is ours. Give it another name.")
        return found
    _refuse_odd(name_or_path)
    known = offers()
    _check_blocked(blocked, known)
    wanted = [offer for offer in known if offer.answers_to(name_or_path)]
    free = [offer for offer in wanted if not offer.blocked_by(blocked)]
    if wanted and not free:
        raise UsageError(f"Plugin {name_or_path!r} is blocked by --no-plugin. Take that away, or name another plugin.")
    if free:
        classes = _classes(_only(free, name_or_path))
        found = [item for item in classes if item.name == free[0].name]
        if found:
            return found[0]
    return _search(name_or_path, [offer for offer in known if not offer.blocked_by(blocked)])


def find(name_or_path: str) -> list[type[Strategy]]:
    """All strategies behind a name, a file, or the folder of a distribution that need not be installed.

    Raises:
        UsageError: as `load`; or a folder without a pyproject.toml that offers a strategy.
        PluginError: as `load`.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return [load(name_or_path)]
    modules = _offered_in(folder)
    for place in (folder / "src", folder):
        if place.is_dir() and str(place.resolve()) not in sys.path:
            sys.path.insert(0, str(place.resolve()))  # it need not be installed; another process finds it there, too
    offers_here = [Offer(name, value, str(folder), "(a folder)") for name, value in modules.items()]
    return [item for offer in offers_here for item in _classes(offer)]


def _refuse_odd(name: str) -> None:
    """Several names in one, or a path at which no file of Python stands."""
    parts = [part.strip() for part in name.split(",") if part.strip()]
    if len(parts) > 1:
        raise UsageError(
            f"{name!r} names {len(parts)} plugins; expected one each: {' '.join(f'--plugin {part}' for part in parts)}."
        )
    if "/" in name or os.sep in name:
        path = os.path.expanduser(name)
        kind = "a folder" if os.path.isdir(path) else "no .py file" if os.path.exists(path) else "not there"
        raise UsageError(
            f"{name} is {kind}; expected a Python file with a Strategy in it, such as ./my_idea.py, or, for `ftplus "
            "plugin test`, also the folder of a distribution."
        )


def _offered_in(folder: Path) -> dict[str, str]:
    """The entry points of group `ftplus` in the pyproject.toml of a folder."""
    import tomllib

    file = folder / "pyproject.toml"
    if not file.is_file():
        raise UsageError(
            f"{folder} holds no pyproject.toml; expected the folder of a distribution, a Python file such as "
            "./my_idea.py, or the name of a strategy."
        )
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {say(error)}. Expected the folder of a distribution.") from error
    found = project.get("entry-points", {}).get(hookspecs.GROUP, {})
    if not found:
        raise UsageError(
            f'{file} offers no strategy; expected [project.entry-points.{hookspecs.GROUP}] with NAME = "MODULE" in it.'
        )
    return found


def resolve(
    item: str | Strategy | type[Strategy] | tuple[str | type[Strategy], dict[str, Any]],
    settings: dict[str, Any] | None = None,
    *,
    blocked: Collection[str] = (),
) -> Strategy:
    """A strategy object from whatever a user wrote: `"ewc"`, `EWC`, `EWC(strength=1)`, `("ewc", {"strength": 1})`.

    Raises:
        UsageError: nothing of the kind; an unknown or bad setting; settings for an object that has its own.
        PluginError: the class cannot be loaded, or breaks the contract.
    """
    if named_with_settings(item):
        return resolve(item[0], {**item[1], **(settings or {})}, blocked=blocked)
    if isinstance(item, str):
        return configure(load(item, blocked=blocked), settings or {})
    if isinstance(item, type):
        return configure(validate(item, "strategies="), settings or {})
    if not isinstance(item, Strategy):
        raise UsageError(
            f"A strategy is {item!r}; expected a name ('ewc'), an object (EWC(strength=1)), a class, or a name with "
            "settings (('ewc', {'strength': 1}))."
        )
    if settings:
        raise UsageError(f"{item!r} has its settings already; give {', '.join(settings)} to it, or write its name.")
    validate(type(item), "strategies=")
    return item


def named_with_settings(item: Any) -> bool:
    """Whether it is `("ewc", {"strength": 1})`."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], dict)


def discover(*, blocked: Collection[str] = ()) -> list[Plugin]:
    """Every entry point of the group, each imported by itself; what fails is a row with its reason."""
    known = offers()
    _check_blocked(blocked, known)
    return [_row(offer, known, blocked) for offer in known]


def origin(strategy: type[Strategy]) -> tuple[str, str]:
    """Who published a strategy: its distribution and version, or the file it was read from and no version."""
    own, known = strategy.__module__, [(offer.value.partition(":")[0].strip(), offer) for offer in offers()]
    found = [offer for module, offer in known if own == module or own.startswith(module + ".")]
    found += [offer for module, offer in known if own.partition(".")[0] == module.partition(".")[0]]  # beside it
    if found:
        return found[0].distribution, found[0].version
    home = sys.modules.get(strategy.__module__)
    return getattr(home, "__file__", None) or strategy.__module__, ""


# ---- entry points ----------------------------------------------------------------------------------------------------


def offers(group: str = hookspecs.GROUP) -> list[Offer]:
    """The entry points of a group, by name, nothing imported; only our own when autoload is disabled."""
    alone = _alone()
    seen: dict[tuple[str, str], Offer] = {}
    for distribution in metadata.distributions():
        for offer in _offers_of(distribution, group):
            if not alone or _canonical(offer.distribution) == hookspecs.HOST:
                seen.setdefault((_canonical(offer.distribution), offer.name), offer)  # the first on sys.path wins
    return sorted(seen.values(), key=lambda offer: (_canonical(offer.distribution) != hookspecs.HOST, offer.name))


def _alone() -> bool:
    return os.environ.get(ALONE, "").lower() not in ("", "0", "false", "no")


def _check_blocked(blocked: Collection[str], known: list[Offer]) -> None:
    names = [offer.name for offer in known]
    for name in blocked:
        if not any(offer.blocked_by([name]) for offer in known):
            _warn(f"--no-plugin {name}: nothing of that name is installed.{nearest(name, names)}")


def commands() -> list[Offer]:
    """Commands that plugins bring: each console script `ftplus-WORD` is `ftplus WORD`, too, as with git and cargo."""
    return [
        dataclasses.replace(offer, name=offer.name.removeprefix("ftplus-"))
        for offer in offers("console_scripts")
        if offer.name.startswith("ftplus-") and _canonical(offer.distribution) != hookspecs.HOST
    ]


def load_command(word: str) -> Any:
    """The click command `ftplus WORD` of a plugin; None where no plugin brings one.

    Raises:
        UsageError: two distributions bring it.
        PluginError: it cannot be loaded, or is no click command.
    """
    import click

    wanted = [offer for offer in commands() if offer.name == word]
    if not wanted:
        return None
    if len(wanted) > 1:
        both = " and ".join(f"{item.distribution} {item.version}" for item in wanted)
        raise UsageError(f"ftplus {word} is brought by {both}. Take one away: pip uninstall {wanted[-1].distribution}.")
    who = f"The command ftplus {word} of {wanted[0].distribution} {wanted[0].version}"
    try:
        command = metadata.EntryPoint(word, wanted[0].value, "console_scripts").load()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything, or leave
        raise PluginError(_cannot_be_loaded(who, error, wanted[0])) from error
    if not isinstance(command, click.Command):
        raise PluginError(f"{who} is {command!r}; expected a click command.")
    return command


def _offers_of(distribution: metadata.Distribution, group: str) -> list[Offer]:
    try:
        found = [item for item in distribution.entry_points if item.group == group]
        if not found:
            return []
        name = distribution.metadata["Name"] or "unknown"
        return [Offer(item.name, item.value, name, distribution.version or "?") for item in found]
    except Exception as error:  # damaged metadata of a stranger, whatever it raises
        _warn(f"Skipped {getattr(distribution, '_path', distribution)}: its metadata cannot be read ({say(error)}).")
        return []


def _only(wanted: list[Offer], name: str) -> Offer:
    if len(wanted) > 1:
        raise UsageError(
            f"Plugin {name!r} is claimed by {' and '.join(f'{item.distribution} {item.version}' for item in wanted)}. "
            f"Choose one: --plugin {' or --plugin '.join(item.full_name for item in wanted)}."
        )
    return wanted[0]


def _search(name: str, known: list[Offer]) -> type[Strategy]:
    """The strategy called `name` in a module whose entry point is called otherwise."""
    found = [(offer, item) for offer in known for item in _classes_or_warn(offer)]
    matches = [(offer, item) for offer, item in found if dataclasses.replace(offer, name=item.name).answers_to(name)]
    if matches:
        _only([dataclasses.replace(offer, name=item.name) for offer, item in matches], name)
        return matches[0][1]
    available = sorted({item.name for _, item in found})
    said = f"No plugin {name!r}.{nearest(name.lower(), available)} {_what_to_type(name, available)}"
    raise MissingPluginError(said, name)


OURS = ("kfac", "l2sp", "osf", "tokenweight", "wise")
"""Offered by the distributions in plugins/, which are on no index."""


def _what_to_type(name: str, available: list[str]) -> str:
    listing = f"Available: {', '.join(available) or 'none'}."
    if not any(_canonical(offer.distribution) == hookspecs.HOST for offer in offers()):
        return f"{listing} {hookspecs.HOST} itself is not installed, only imported: pip install -e . in its folder."
    if _alone():
        return f"{listing} {ALONE} is set: unset it to see what else is installed."
    if nearest(name.lower(), available):
        return listing
    if not NAME.fullmatch(name):
        return f"{listing} For a file of your own, give its path: --plugin ./my_idea.py."
    if name in OURS:
        return f"{listing} In a clone of hf-ftplus: pip install ./plugins/ftplus-{name}."
    if folder := _folder_of(name):
        return f"{listing} It is not installed yet. Type pip install -e {folder}"
    return f"{listing} Of a distribution in a folder: pip install -e FOLDER."


def _folder_of(name: str) -> Path | None:
    """The folder here whose distribution offers a strategy, as `ftplus plugin new` leaves it."""
    for folder in (Path(), Path(f"ftplus-{name}")):
        try:
            if name in _offered_in(folder):
                return folder
        except UsageError:  # no distribution
            continue
    return None


def _row(offer: Offer, known: list[Offer], blocked: Collection[str]) -> Plugin:
    row = Plugin(offer.name, offer.distribution, offer.version, "ok")
    if offer.blocked_by(blocked):
        return dataclasses.replace(row, status="blocked", reason="--no-plugin")
    try:
        classes = _classes(offer)
        _only([item for item in known if item.name == offer.name and not item.blocked_by(blocked)], offer.name)
    except FTPlusError as error:
        _warn(str(error))
        return dataclasses.replace(row, status="failed", reason=str(error))
    return dataclasses.replace(row, strategies={item.name: headline(item) for item in classes})


def headline(strategy: type[Strategy]) -> str:
    """The first line of what a strategy says about itself; empty when it says nothing of its own."""
    text = inspect.cleandoc(strategy.__doc__ or "")
    return "" if text.startswith(f"{strategy.__name__}(") else text.partition("\n")[0]  # dataclass writes a signature


def _classes_or_warn(offer: Offer) -> list[type[Strategy]]:
    try:
        return _classes(offer)
    except PluginError as error:
        _warn(str(error))
        return []


def _classes(offer: Offer) -> list[type[Strategy]]:
    """Import one entry point and ask it for its strategies; whatever goes wrong is a PluginError that names it."""
    who = f"Plugin {offer.name!r} of {offer.distribution} {offer.version}"
    try:
        check_api(written_for(offer.value), who)
        module = metadata.EntryPoint(offer.name, offer.value, hookspecs.GROUP).load()
        classes = ask(module, who)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything, or leave
        raise PluginError(_cannot_be_loaded(who, error, offer)) from error
    if not classes:
        raise PluginError(
            f"{who} offers no strategy; expected a function `@hookimpl ftplus_strategies` in {offer.value}."
        )
    return classes


def _cannot_be_loaded(who: str, error: BaseException, offer: Offer) -> str:
    return (
        f"{who} cannot be loaded: {say(error)}. Install it again from where you had it, or leave it out (pip uninstall "
        f"{offer.distribution})."
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def load_file(path: Path) -> list[type[Strategy]]:
    """The strategies of a single-file plugin: what its `ftplus_strategies` returns, or the classes written in it."""
    if not os.path.isfile(os.path.expanduser(path)):
        raise UsageError(f"No plugin file at {str(path)!r}; expected a Python file with a Strategy in it.")
    path = path.expanduser().resolve()
    try:
        module = _import_file(path)
        classes = ask(module, str(path))
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"Plugin file {path} cannot be loaded: {say(error)}.") from error
    return classes or [validate(item, str(path)) for item in _written_in(module)]


def _import_file(path: Path) -> ModuleType:
    # Two files may share a stem, and an edited file is another one; the same file read twice is the same class.
    source = path.read_bytes()
    digest = hashlib.sha256(str(path).encode() + source).hexdigest()
    name = f"ftplus_file_{path.stem}_{digest[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no loader for {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up here when it reads its own types
    try:
        # not by its loader, which would take what it compiled of another text of the same second and size
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _written_in(module: ModuleType) -> Iterator[type[Strategy]]:
    classes = dict.fromkeys(item for item in vars(module).values() if isinstance(item, type))  # one may have two names
    for item in classes:
        if issubclass(item, Strategy) and item.__module__ == module.__name__:
            yield item


def _pick(classes: list[type[Strategy]], pick: str | None, where: str) -> type[Strategy]:
    names = [item.__name__ for item in classes]
    if not classes:
        raise UsageError(f"No strategy in {where}; expected a subclass of hf_ftplus.Strategy.")
    if pick is None and len(classes) > 1:
        raise UsageError(f"{where} holds {', '.join(names)}. Choose one: --plugin {where}:{names[0]}.")
    chosen = [item for item in classes if pick in (None, item.__name__, item.name)]
    if not chosen:
        raise UsageError(f"No strategy {pick!r} in {where}.{nearest(str(pick), names)} It holds {', '.join(names)}.")
    return chosen[0]


# ---- words -----------------------------------------------------------------------------------------------------------


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def _warn(message: str) -> None:
    """Once per message and process; through logging, so that a broken stranger stops nobody who runs `-W error`."""
    logger.warning("ftplus: warning: %s", message)
