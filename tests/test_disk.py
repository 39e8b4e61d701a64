"""A file is there whole, or as it was before."""

from __future__ import annotations

import errno

import pytest

from hf_ftplus import disk
from hf_ftplus.disk import replace


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_where_names_in_a_folder_cannot_be_flushed_files_still_are(tmp_path, monkeypatch, number):
    def refused(handle):
        raise OSError(number, "no such thing")

    monkeypatch.setattr(disk.os, "fsync", refused)
    disk.flush(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no such thing"):
        disk.flush(tmp_path / "file")


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
