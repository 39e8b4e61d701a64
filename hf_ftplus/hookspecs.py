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

That is the whole contract. pluggy only finds the classes; a run makes objects of those that were asked for by name and
calls them in the order given (see `strategy.py`). What is installed and not asked for never runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .strategy import Strategy

GROUP = "ftplus"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def ftplus_strategies() -> list[type[Strategy]]:  # type: ignore[empty-body]
    """The strategy classes of this module. Import torch inside their methods, so that listing them stays fast."""
