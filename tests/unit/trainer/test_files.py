"""Files are replaced whole or not at all."""

import hashlib

import pytest

from trainer.files import replacing, sha256, write_text


@pytest.mark.parametrize("shared", [False, True])
def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path, shared):
    file = tmp_path / "figures.json"
    write_text(file, "old")
    with replacing(file, shared=shared) as partial:
        partial.write_text("new")
        assert file.read_text() == "old" and partial.parent == file.parent
    assert file.read_text() == "new"
    with pytest.raises(RuntimeError), replacing(file, shared=shared) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / "cached"
    with replacing(file, shared=True) as first, replacing(file, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first"


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"rank")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"rank").hexdigest()
