"""A file is there whole, or as it was before."""

from __future__ import annotations

import pytest

from hf_ftplus.disk import replace


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    replace(path, lambda file: file.write_text("first"))

    def half(file):
        file.write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(path, half)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
