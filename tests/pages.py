"""What a page says of strategies, made from the strategies themselves."""

from __future__ import annotations

import textwrap

from hf_ftplus import strategy
from hf_ftplus.cli.plugins import describe
from hf_ftplus.plugins import load


def settings_table(*names: str) -> str:
    """Every setting of these strategies."""
    lines = ["| setting | default | allowed | what it does |", "|---|---|---|---|"]
    for name in names:
        for item in describe(load(name), "", "")["settings"]:
            limits = ", ".join(part for part in (item["unit"], item["range"]) if part)
            default = "none" if item["default"] is None else item["default"]
            default = str(default).lower() if isinstance(default, bool) else default
            lines.append(f"| `{name}.{item['name']}` | {default} | {limits} | {item['help']} |")
    return "\n".join(lines)


def example() -> str:
    """The strategy that `strategy.py` shows to authors, as a file of its own."""
    page = strategy.__doc__
    return textwrap.dedent(page[page.index("    from dataclasses") :]).replace("'''", '"""')
