"""Telling an intact checkpoint from a damaged one, without reading it into memory and without running it.

``torch.save`` writes a zip file whose every record carries a CRC-32; ``torch.load`` does not look at them, this does.
A changed byte, or a change within any four bytes of one record, is always found; any other change in a record goes
unnoticed once in 2**32. A file that is too short, too long or put together wrongly is always found. What remains are
changes in the padding between the records and in header fields that no reader uses; they change nothing that is loaded.
This guards against accidents. It is no signature: who writes a file on purpose also writes its checksums.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import sys
import zipfile
from collections.abc import Sequence
from typing import IO

from levin.checkpoint.layout import META_FILE, ZERO_FOLDER, folder_name, is_zero
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import exists, get_filesystem, is_folder, is_local, list_folder, local_path, modified_s
from levin.utilities.rank_zero import rank_zero_warn

_READ_BYTES = 4 * 2**20
_ZIP_MAGIC = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
_USUAL_FLAGS = 0x0808  # name in UTF-8, checksum behind the data
_IS_FOLDER = 0x10
_UNREADABLE = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    struct.error,
)


def verify(path: str | os.PathLike[str]) -> None:
    """Check that the checkpoint at ``path`` is complete and as it was written.

    Args:
        path: A file, or the folder of a sharded checkpoint (whose ``meta.pt`` is checked, and whose other files have to
            be there), local or remote.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        DamagedCheckpointError: It is damaged, or carries no checksums. The message says what is wrong.

    Example:
        >>> verify("best.ckpt")  # doctest: +SKIP
    """
    if is_folder(path):
        _verify_folder(folder_name(path))
        return
    with open_for_reading(path) as file:
        if not is_zip(file):
            raise DamagedCheckpointError(
                f"{path} is no checkpoint, or its first bytes are damaged. Files that torch wrote before version 1.6 "
                "carry no checksums; load such a file and save it again."
            )
        if not check_zip(file, str(path)):
            raise DamagedCheckpointError(
                f"{path} carries no checksums, since they were switched off when it was written "
                "(torch.serialization.set_crc32_options). Load it and save it again to have it checked."
            )


def find_newest_intact(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> str | None:
    """Return the newest checkpoint in a folder that is intact.

    Args:
        folder: Local or remote; one that does not exist is like an empty one.
        pattern: Which names are checkpoints.

    Returns:
        Path or URL, or None when there is none. Newer ones that are damaged are named in a warning each.

    Example:
        >>> find_newest_intact("checkpoints")  # None when there is no such folder
    """
    for path in _newest_first(str(folder), pattern):
        try:
            verify(path)
        except (ValueError, OSError) as error:
            rank_zero_warn(f"Skipping a checkpoint that cannot be used: {error}")
        else:
            return path
    return None


def main(arguments: Sequence[str]) -> int:
    """Verify each of the files named in ``arguments`` and print the result; return 0 when all are intact, else 1.

    This is the command ``levin verify FILE...``.
    """
    parser = argparse.ArgumentParser(
        prog="levin verify",
        description="Say which checkpoints are intact.",
        epilog="Example: levin verify lightning_logs/version_3/checkpoints/*.ckpt",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint file, or the folder of a sharded one")
    status = 0
    for path in parser.parse_args(arguments).files:
        try:
            verify(path)
        except (ValueError, OSError) as error:
            status = 1
            print(f"BAD     {path}: {error}")
        else:
            print(f"intact  {path}")
    return status


def open_for_reading(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a local or remote file.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
    """
    if is_local(path):
        local = local_path(path)
        if not os.path.exists(local):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        if os.path.isdir(local):
            raise IsADirectoryError(f"{path} is a folder. A checkpoint in one file was expected.")
        return open(local, "rb")
    try:
        file: IO[bytes] = get_filesystem(path).open(str(path), "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"Checkpoint file not found: {path}") from None
    return file


def is_zip(file: IO[bytes]) -> bool:
    """Return whether an open file begins as a zip file does; the position stays."""
    position = file.tell()
    magic = file.read(len(_ZIP_MAGIC))
    file.seek(position)
    return magic == _ZIP_MAGIC


def check_zip(file: IO[bytes], name: str) -> bool:
    """Check structure and checksums of an open zip file in the layout of ``torch.save``.

    Args:
        file: At the beginning of the zip file, which must be all that follows; the position stays.
        name: For messages.

    Returns:
        Whether the file carries checksums. Without them, the structure alone was checked.

    Raises:
        DamagedCheckpointError: The file is damaged.
    """
    position = file.tell()
    try:
        return _check_zip(file, name)
    except _Damage as error:
        raise DamagedCheckpointError(f"{name} is damaged: {error}. Use an older checkpoint.") from None
    except EOFError:
        raise DamagedCheckpointError(f"{name} is damaged: it ends too early. Use an older checkpoint.") from None
    except _UNREADABLE as error:
        raise DamagedCheckpointError(f"{name} is damaged: {error}. Use an older checkpoint.") from error
    finally:
        file.seek(position)


class _Damage(Exception):
    """What is wrong with a file."""


def _check_zip(file: IO[bytes], name: str) -> bool:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        _check_structure(file, archive, records)
        if all(record.CRC == 0 for record in records):
            return False
        for record in records:
            with archive.open(record) as content:
                while content.read(_READ_BYTES):  # the checksum is compared when the end is reached
                    pass
    return True


def _check_structure(file: IO[bytes], archive: zipfile.ZipFile, records: list[zipfile.ZipInfo]) -> None:
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(size - _END.size)
    signature, _, _, count_here, count, _, _, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06" or comment:
        raise _Damage("something follows its end")
    if not (count_here == count == min(len(records), 0xFFFF)):
        raise _Damage(f"its directory lists {len(records)} records, and {count} are expected")
    names = [record.filename for record in records]
    if len(set(names)) != len(names):
        raise _Damage("a record is there twice")
    if not any(entry.endswith("/data.pkl") for entry in names) or len({entry.split("/")[0] for entry in names}) != 1:
        raise _Damage("a record of torch.save is missing or has a wrong name")
    position = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise _Damage(f"record {record.filename!r} is compressed, which torch.save never does")
        if record.volume or record.comment or record.is_dir() or record.external_attr & _IS_FOLDER:
            raise _Damage(f"the entry of record {record.filename!r} is not one of a file")
        if record.flag_bits & ~_USUAL_FLAGS:
            raise _Damage(f"record {record.filename!r} has unknown flags")
        if record.header_offset < position:
            raise _Damage(f"record {record.filename!r} overlaps another one")
        position = record.header_offset + record.file_size
    if position > archive.start_dir:
        raise _Damage("its records are longer than the file")


def _verify_folder(folder: str) -> None:
    meta = f"{folder}/{META_FILE}"
    if not exists(meta):
        raise DamagedCheckpointError(
            f"{folder} is a folder without `meta.pt`, so it is no complete sharded checkpoint."
        )
    verify(meta)
    if is_zero(folder):
        for path in list_folder(f"{folder}/{ZERO_FOLDER}"):
            verify(path)
        return
    names = [os.path.basename(path) for path in list_folder(folder)]
    if ".metadata" not in names or not any(name.endswith(".distcp") for name in names):
        raise DamagedCheckpointError(
            f"{folder} lacks `.metadata` or the `.distcp` files, so it is no complete sharded checkpoint."
        )
    with open_for_reading(f"{folder}/.metadata") as index:
        written = {name.decode() for name in re.findall(rb"__\d+_\d+\.distcp", index.read())}
    missing = sorted(written - set(names))
    if missing:
        raise DamagedCheckpointError(
            f"{folder} lacks {', '.join(missing[:5])}, the part of a process, so it is no complete sharded checkpoint. Copy all of its "
            "files, or use another checkpoint."
        )


def _newest_first(folder: str, pattern: str) -> list[str]:
    if is_local(folder):
        from glob import escape, glob

        paths = glob(os.path.join(escape(local_path(folder)), pattern))
        # A link and its target are one checkpoint; a link to nothing is damaged.
        found = {os.path.realpath(path): path for path in sorted(paths, key=os.path.islink, reverse=True)}
        return sorted(found.values(), key=_modified, reverse=True)
    filesystem = get_filesystem(folder)
    if not filesystem.exists(folder):
        return []
    matching = map(str, filesystem.glob(f"{folder.rstrip('/')}/{pattern}"))
    remote = [path for path in matching if not os.path.basename(path).startswith(".")]
    urls = [str(filesystem.unstrip_protocol(path)) for path in remote]
    return sorted(urls, key=lambda url: (modified_s(url), url), reverse=True)


def _modified(path: str) -> tuple[object, str]:
    try:
        return os.stat(path).st_mtime_ns, path
    except OSError:
        return sys.maxsize, path
