"""Files are replaced whole or not at all."""

import hashlib
import os
import stat

import pytest

from trainer.files import new_folder, replacing, sha256, write_text


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


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_are_those_of_the_umask_whatever_wrote_the_file(tmp_path, umask):
    with replacing(tmp_path / "file", durable=True) as partial:
        partial.unlink()
        partial.touch(0o600)  # as libraries do that write a temporary file
    assert mode(tmp_path / "file") == 0o666 & ~umask
    with new_folder(tmp_path / "folder") as partial:
        (partial / "file").touch(0o600)
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder/file") == 0o666 & ~umask


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder") as partial:
        (partial / "file").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("old", "new"):
        with new_folder(tmp_path / "folder") as partial:
            (partial / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_a_folder_that_cannot_be_deleted_is_named_with_the_remedy(tmp_path, monkeypatch):
    """Such as one with another user's files in it. (Root deletes all: made up.)"""
    monkeypatch.setattr("trainer.files.shutil.rmtree", lambda *_, **__: None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/old").touch()
    with pytest.raises(OSError, match=r"adapter is there and cannot be deleted; accepted: delete"):
        with new_folder(tmp_path / "adapter"):
            pass
