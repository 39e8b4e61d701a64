"""The laws as tests: `pytest --ftplus NAME` adds one test for each law to whatever else is collected.

NAME is what `ftplus plugin test` takes: an installed strategy, a file, or the folder of a distribution. Settings follow
it: `--ftplus NAME:strength=0.1`. A law that is broken knowingly is an expected failure. pytest loads this module
in every environment that has hf-ftplus, so it imports nothing until it is asked.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf-ftplus", "the laws of strategies")
    group.addoption(
        "--ftplus",
        action="append",
        default=[],
        metavar="NAME",
        help="a strategy (name, file or folder) to judge by the laws",
    )
    more = {
        "--ftplus-law": {"action": "append", "default": [], "metavar": "LAW", "help": "only this law, as 'acts'"},
        "--ftplus-zero": {
            "action": "append", "default": [], "metavar": "SETTING=VALUE", "help": "what turns it off",
        },
        "--ftplus-tasks": {"type": int, "metavar": "N", "help": "learn rows of N tasks, in a column `task`"},
        "--ftplus-distributed": {"action": "store_true", "help": "also train it on two processes"},
        "--ftplus-second-run": {"action": "store_true", "help": "judge it with the memory of a first run"},
        "--ftplus-acts-at-start": {"action": "store_true", "help": "it is meant to act before any weight has moved"},
        "--ftplus-no-lora": {"action": "store_true", "help": "judge it on full fine-tuning alone"},
    }  # fmt: skip
    for flag, how in more.items():
        group.addoption(flag, **how)


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in config.getoption("--ftplus"):
        items += _laws_of(session, config, name)


class Law(pytest.Item):
    """One law, tried on one strategy; all of a strategy share a bench, and with it the first of two runs."""

    def __init__(self, *, law: Callable, bench: Bench, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.law, self.bench = law, bench

    def runtest(self) -> None:
        import warnings

        with self.bench.open() as bench, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the stack below us, which is not on trial
            try:
                bench.hold(self.law)
            except AssertionError:
                if not bench.excuse:
                    raise
                pytest.xfail(bench.excuse)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if not isinstance(excinfo.value, AssertionError):
            return super().repr_failure(excinfo)
        from .testing.judged import fix_for

        return f"{excinfo.value}\n{fix_for(str(excinfo.value))}"

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.name


class Bench:
    """Makes the bench of a strategy when its first law is tried, and keeps it until pytest ends."""

    def __init__(self, strategy: Any, config: pytest.Config) -> None:
        self.strategy, self.config = strategy, config
        self.made: Any = None

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        from .testing.bench import quiet, rng_restored

        if self.made is None:
            from .testing.declared import expected
            from .testing.judged import courtroom, refused_lora

            world = expected(self.strategy, **_asked(self.config))
            lora = world.get("peft", True) and not refused_lora(self.strategy, **_asked(self.config))
            entered = contextlib.ExitStack()
            self.config.add_cleanup(entered.close)
            self.made = entered.enter_context(courtroom(self.strategy, **{**world, "peft": lora}))
        with quiet(), rng_restored():
            yield self.made


def _asked(config: pytest.Config) -> dict[str, Any]:
    """What was typed, as `ftplus plugin test` takes it; None asks nothing."""
    from .cli.plugin_test import values

    option = config.getoption
    return {
        "processes": option("--ftplus-distributed"),
        "second_run": option("--ftplus-second-run") or None,
        "from_start": False if option("--ftplus-acts-at-start") else None,
        "peft": False if option("--ftplus-no-lora") else None,
        "zero": values(option("--ftplus-zero")) or None,
        "tasks": option("--ftplus-tasks"),
    }


def _laws_of(session: pytest.Session, config: pytest.Config, asked: str) -> list[Law]:
    from .cli.plugin_test import laws_called
    from .errors import FTPlusError
    from .plugins import find, resolve
    from .testing import LAWS
    from .testing.declared import expected

    name, settings = _parted(asked)
    try:
        strategies = [resolve(kind, settings) for kind in find(name)]
        for strategy in strategies:
            expected(strategy, **_asked(config))
        laws = laws_called(config.getoption("--ftplus-law")) or LAWS
    except FTPlusError as error:
        raise pytest.UsageError(f"--ftplus {asked}: {error}") from error
    return [
        Law.from_parent(session, name=f"{strategy.name}: {law.__name__.removeprefix('law_')}", law=law, bench=bench)
        for strategy in strategies
        for bench in [Bench(strategy, config)]
        for law in laws
    ]


def _parted(asked: str) -> tuple[str, dict[str, str]]:
    """`name:strength=0.1,rows=8` as a name and settings; a Windows path or `file.py:Class` has a colon of its own."""
    name, colon, settings = asked.rpartition(":")
    if not colon or "=" not in settings:
        return asked, {}
    return name, dict(pair.split("=", 1) for pair in settings.split(","))
