"""Every plugin is tested from a wheel that is built from its folder: what is in no wheel cannot be imported."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from published import install, wheels

_site = tempfile.TemporaryDirectory(prefix="ftplus-plugins-")
_here = Path(__file__).parent
_out = Path(_site.name)
sys.path.insert(
    0, str(install(wheels([path.parent for path in sorted(_here.glob("*/pyproject.toml"))], _out), _out / "site"))
)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    _site.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All laws on every plugin take minutes: they are tried when plugins are asked for (`make plugins`)."""
    asked = any("plugins" in str(word) for word in config.invocation_params.args) or "laws" in config.option.markexpr
    if asked:
        return
    long = [item for item in items if item.get_closest_marker("laws") or "every_law" in item.name]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]
