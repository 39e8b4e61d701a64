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
