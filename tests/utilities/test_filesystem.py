"""Files and folders at local paths and URLs, and files that take their names when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path

import fsspec
import pytest

from levin.utilities import filesystem
from levin.utilities.filesystem import atomic_open, replace_link, sync_folder


@pytest.fixture(params=["", "file://", "memory:/"])
def root(request, tmp_path):
    """A folder as people write it: a path, or a URL."""
    folder = f"{request.param}{tmp_path}"
    filesystem.ensure_folder(f"{folder}/made/parents")
    filesystem.ensure_folder(f"{folder}/made/parents")
    yield f"{folder}/made/parents"
    filesystem.remove(f"{folder}/made")


def read(path):
    with filesystem.open_file(path) as file:
        return file.read()


def test_a_folder_local_or_remote(root):
    assert filesystem.is_local(root) == ("memory" not in root)
    assert filesystem.exists(root) and filesystem.is_folder(root) and filesystem.list_folder(root) == []
    filesystem.replace_text(f"{root}/text", "a\r\né\n")
    assert read(f"{root}/text") == "a\r\né\n" and filesystem.exists(f"{root}/text")
    filesystem.replace_text(f"{root}/text", "new")
    assert read(f"{root}/text") == "new" and not filesystem.is_folder(f"{root}/text")
    with filesystem.open_file(f"{root}/data", "wb") as file:
        file.write("é".encode())
    with filesystem.open_file(f"{root}/data", "rb") as file:
        assert file.read() == "é".encode()
    filesystem.ensure_folder(f"{root}/folder/inner")
    paths = sorted(map(filesystem.absolute, filesystem.list_folder(root)))
    assert paths == [filesystem.absolute(f"{root}/{name}") for name in ("data", "folder", "text")]
    assert filesystem.list_folder(f"{root}/text") == filesystem.list_folder(f"{root}/absent") == []
    for name in ("text", "folder", "absent"):
        filesystem.remove(f"{root}/{name}")
        assert not filesystem.exists(f"{root}/{name}")
    assert filesystem.exists(f"{root}/data") and not filesystem.is_folder(f"{root}/absent")


def test_links_are_told_from_what_they_lead_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "broken").symlink_to("nothing")
    assert filesystem.exists(tmp_path / "broken") and filesystem.is_folder(tmp_path / "link")
    filesystem.remove(tmp_path / "link")
    filesystem.remove(tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and (tmp_path / "folder/file").exists()


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "text").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        filesystem.replace_text(tmp_path / "text", "\ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("text", "old")]


def test_when_something_was_changed_last(root):
    for name in ("folder/a", "folder/b"):
        filesystem.ensure_folder(f"{root}/folder")
        filesystem.replace_text(f"{root}/{name}", "1")
    filesystem.set_modified(f"{root}/folder/a", 1000.5)
    filesystem.set_modified(f"{root}/folder", 1000.5)
    filesystem.set_modified(f"{root}/absent", 1000.5)
    is_local = filesystem.is_local(root)
    ages = [time.time() - filesystem.modified_s(f"{root}/folder{name}") for name in ("", "/b")]
    assert all(-1 < age < 60 for age in ages)
    assert (filesystem.modified_s(f"{root}/folder/a") == 1000.5) == is_local
    if not is_local:
        filesystem.ensure_folder(f"{root}/empty")
        newest = max(filesystem.modified_s(f"{root}/folder/{name}") for name in "ab")
        assert filesystem.modified_s(f"{root}/folder") == newest and filesystem.modified_s(f"{root}/empty") == 0.0


def test_paths_in_one_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert filesystem.absolute("a/../b") == filesystem.absolute(f"local://{tmp_path}/b/") == f"{tmp_path}/b"
    assert filesystem.absolute("s3://a//b/") == "s3://a/b" and filesystem.local_path("file:///a") == "/a"
    assert filesystem.is_inside("a/b", ".") and filesystem.is_inside("/a", "/") and not filesystem.is_inside("a", "a")
    assert [filesystem.is_local(path) for path in ("a", Path("a"), "local://a", "file://a", "s3://a")] == [True] * 4 + [
        False
    ]


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("old", [None, "file", "folder", "link to a folder"])
@pytest.mark.parametrize("target", ["file", "folder"])
def test_a_link_takes_the_place_of_what_was_there(tmp_path, monkeypatch, caplog, has_links, old, target):
    (tmp_path / "file").write_text("file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inner").write_text("folder")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/last"
    if old == "file":
        link.write_text("old")
    elif old == "folder":
        link.mkdir()
        (link / "old").touch()
    elif old is not None:
        link.symlink_to("../folder")
    if not has_links:
        monkeypatch.setattr(os, "symlink", lambda *args: os.open(tmp_path / "no links here", 0))
    removed, remove = [], filesystem.remove
    monkeypatch.setattr(filesystem, "remove", lambda path: (removed.append(path), remove(path)))
    with caplog.at_level("INFO", "levin"):
        replace_link(f"file://{tmp_path}/{target}", str(link))
    assert (link.read_text() if target == "file" else (link / "inner").read_text()) == target
    is_renamed = old != "folder" and (has_links or target == "file")  # there is a file at every instant
    assert removed == ([] if is_renamed else [str(link)])
    assert link.is_symlink() == has_links and (not has_links or os.readlink(link) == f"../{target}")
    assert [path.name for path in link.parent.iterdir()] == ["last"] and (tmp_path / "folder/inner").exists()
    said = f"{link} becomes a copy of {tmp_path}/{target}, since it cannot be a link: "
    assert [message.partition("[Errno")[0] for message in caplog.messages] == ([] if has_links else [said])


# ---------------------------------------------------------------- whole or not at all


def test_what_is_written_is_synced_before_it_has_its_name_and_the_folders_after(tmp_path, monkeypatch):
    synced, fsync, replace = [], os.fsync, os.replace

    def name_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path))

    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(name_of(descriptor)), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (synced.append("named"), replace(old, new)))
    with atomic_open(tmp_path / "new/folder/file") as file:
        file.write(memoryview(b"abcdefgh").cast("I"))
        assert file.tell() == 8 and not (tmp_path / "new/folder/file").exists()
        (temporary,) = (tmp_path / "new/folder").iterdir()
        file.flush()
        assert temporary.read_bytes() == b"abcdefgh"
    assert synced == ["", "/new", f"/new/folder/{temporary.name}", "named", "/new/folder"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat(tmp_path / "new/folder/file").st_mode) == 0o666 & ~mask


def test_a_file_is_as_old_as_the_moment_in_which_it_was_opened(tmp_path):
    before = time.time()
    with atomic_open(tmp_path / "file"):
        opened = time.time()
        time.sleep(0.02)
    assert before - 0.001 <= (tmp_path / "file").stat().st_mtime <= opened


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    old, names = time.time() - 61, {"young": 40, "old": 61, "locked": 61, "other.tmp": 61}
    for name, age in names.items():
        path = tmp_path / (name if name == "other.tmp" else f".levin-{name}.tmp")
        path.touch()
        os.utime(path, (old + 61 - age,) * 2)
    (tmp_path / ".levin-other").touch()
    os.utime(tmp_path / ".levin-other", (old, old))
    (tmp_path / ".levin-link.tmp").symlink_to("nothing")
    os.utime(tmp_path / ".levin-link.tmp", (old, old), follow_symlinks=False)
    (tmp_path / ".levin-folder.tmp").mkdir()
    os.utime(tmp_path / ".levin-folder.tmp", (old, old))
    with open(tmp_path / ".levin-locked.tmp", "rb") as locked:
        import fcntl

        fcntl.flock(locked, fcntl.LOCK_EX)
        with atomic_open(tmp_path / "file"):
            pass
    left = {".levin-young.tmp", ".levin-locked.tmp", ".levin-other", ".levin-folder.tmp", "other.tmp", "file"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_file_that_is_being_written_is_not_taken_for_one_that_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "_LEFTOVER_AGE_S", -1.0)
    with atomic_open(tmp_path / "a") as a:
        a.write(b"a")
        with atomic_open(tmp_path / "b") as b:
            b.write(b"b")
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("a", "a"), ("b", "b")]


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="in the place of the file that was to be saved") as caught:
        with atomic_open(tmp_path / "folder"):
            pass
    assert caught.value.filename == str(tmp_path / "folder") and caught.value.errno == errno.EISDIR
    (tmp_path / "file").touch()
    for path in ("file/a", "file/a/b"):
        with pytest.raises(NotADirectoryError) as caught, atomic_open(tmp_path / path):
            pass
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["file", "folder"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "broken"), ("broken", "{path}")), (OSError(errno.EIO, "broken", "other"), ("broken", "other")),
        (OSError("in words"), (None, None)),
    ],
)  # fmt: skip
def test_an_error_names_the_file_that_was_to_be(tmp_path, error, said):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError) as caught, atomic_open(tmp_path / "file"):
        raise error
    name = said[1] and said[1].format(path=tmp_path / "file")
    assert (caught.value.strerror, caught.value.filename) == (said[0], name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_is_an_error_only_where_it_need_be(tmp_path, monkeypatch, number, is_raised):
    def fails(descriptor):
        seen.append(descriptor)
        raise OSError(number, "no")

    seen = []
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no") if is_raised else contextlib.nullcontext():
        sync_folder(str(tmp_path))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


# ---------------------------------------------------------------- remote


@pytest.fixture
def remote():
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_remote_file_is_written_aside_and_moved(remote):
    with atomic_open("memory://bucket/new/file") as file:
        file.write(b"old")
        (temporary,) = remote.ls("/bucket/new", detail=False)
        assert temporary.startswith("/bucket/new/.levin-") and temporary.endswith(".tmp")
    with pytest.raises(ValueError, match="mine"), atomic_open("memory://bucket/new/file") as file:
        file.write(b"new")
        raise ValueError("mine")
    assert remote.ls("/bucket/new", detail=False) == ["/bucket/new/file"] and remote.cat("/bucket/new/file") == b"old"


@pytest.mark.parametrize("size", [2, None, 3])
def test_a_remote_file_of_which_a_part_arrived_is_an_error(remote, monkeypatch, size):
    remote.pipe("/bucket/file", b"old")
    info = type(remote).info
    monkeypatch.setattr(type(remote), "info", lambda self, path: info(self, path) | {"size": size})
    is_short = size == 2
    with pytest.raises(OSError, match="2 of 3 bytes arrived") if is_short else contextlib.nullcontext() as caught:
        with atomic_open("memory://bucket/file") as file:
            file.write(b"new")
    monkeypatch.undo()
    assert remote.cat("/bucket/file") == (b"old" if is_short else b"new")
    assert list(remote.find("/bucket")) == ["/bucket/file"]
    assert not is_short or (caught.value.filename, caught.value.errno) == ("memory://bucket/file", errno.EIO)


@pytest.mark.parametrize("protocol", ["s3", ("gcs", "gs")])
def test_an_object_store_gets_the_file_in_a_transaction(remote, monkeypatch, protocol):
    monkeypatch.setattr(type(remote), "protocol", protocol)
    monkeypatch.setattr(type(remote), "mv", None)
    with atomic_open("memory://bucket/new/file") as file:
        file.write(b"old")
        assert not remote.exists("/bucket/new/file")
    with pytest.raises(ValueError, match="mine"), atomic_open("memory://bucket/new/file") as file:
        file.write(b"new")
        raise ValueError("mine")
    assert remote.cat("/bucket/new/file") == b"old" and remote.find("/bucket") == ["/bucket/new/file"]
