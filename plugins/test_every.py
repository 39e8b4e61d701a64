"""`ftplus plugin test` passes every plugin of this folder as it is: what it means to do otherwise, it declares."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ftplus.cli import main

NAMES = sorted(folder.parent.name.removeprefix("ftplus-") for folder in Path(__file__).parent.glob("*/pyproject.toml"))
DECLARED = ("silent at zero", "acts", "leaves no trace", "travels light")
"""Laws that a declaration can change; the others are tried by the tests of each plugin."""


@pytest.mark.laws
@pytest.mark.parametrize("name", NAMES)
def test_the_command_passes_every_plugin_without_a_flag(capsys, name):
    code = main(["plugin", "test", name, *(word for law in DECLARED for word in ("--law", law))])
    out, err = capsys.readouterr()
    assert code == 0, out + err
    if "excused" in out:
        assert "knowingly" in out
