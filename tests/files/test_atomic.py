"""A file's name never stands for half of it."""

import pytest

from mindformers_ext.files.atomic import whole_file, write_json, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"é": 1}, durable=True)
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
