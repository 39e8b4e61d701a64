"""How a package offers strategies: write one function, name its module in one entry point.

    from hf_ftplus import Strategy, hookimpl, setting

    @dataclass
    class L2SP(Strategy): ...

    @hookimpl
    def ftplus_strategies():
        return [L2SP]

and in pyproject.toml, with the name of the strategy on the left:

    [project.entry-points.ftplus]
    l2sp = "ftplus_l2sp"

A module may say which contract it was written for, `ftplus_api = 1`; a host that speaks another refuses it by name
before it is imported (a package that it lies in is imported first). That is the whole contract. pluggy only finds the
classes; a run makes objects of those that were asked for by name and calls them in the order given (see `strategy.py`).
What is installed and not asked for never runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .strategy import Strategy

GROUP = "ftplus"
"""The entry-point group, and pluggy's project name."""

HOST = "hf-ftplus"
"""The distribution that this is."""

API = 1
"""The contract of this page and of `strategy.py`. It grows without a new number: a strategy that was written for an
older host of the same number keeps working. What would break one is announced by a DeprecationWarning for at least one
minor version, and then raises the number."""

LEAVING: dict[str, str] = {}
"""Moments that the next number drops, and what to override instead. Until then they are called, with a
DeprecationWarning; tests and `ftplus plugin test` show it."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def ftplus_strategies() -> list[type[Strategy]]:  # type: ignore[empty-body]
    """The strategy classes of this module. Import torch inside their methods, so that listing them stays fast."""
