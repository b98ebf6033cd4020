"""Takes single files out of a zip archive that somebody else made, trusting nothing the archive says."""

import errno
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from ..pulid.errors import DamagedWeights, DownloadError
from .catalogue import WeightFile

CHUNK = 1 << 20
LARGEST = 512 << 20  # bytes of an entry; antelopev2's larger file has 261 MB
LARGEST_DIRECTORY = 4 << 20  # bytes: Python makes some ten times as much of a zip's list of entries

# The records at the end of a zip, as far as they are needed here (APPNOTE.TXT 4.3.14 to 4.3.16).
END = struct.Struct("<4s8xL4xH")  # signature, bytes of the directory, length of the comment
END_64_LOCATOR = struct.Struct("<4s4xQ4x")  # signature, where the record of 64-bit sizes lies
END_64 = struct.Struct("<4s36xQ8x")  # signature, bytes of the directory
LONGEST_COMMENT = 1 << 16


def unpack(archive: Path, files: Iterable[WeightFile], folder: Path) -> None:
    """Write those files into `folder`, each whole or not at all, wherever in the archive they lie.

    Paths inside the archive are never used. Raises DamagedWeights unless each is there as it was published, and
    DownloadError where the folder does not take it.
    """
    check_directory(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = {entry.filename.replace("\\", "/").rpartition("/")[2]: entry for entry in opened.infolist()}
            for file in files:
                if file.name not in entries:
                    raise _damaged(archive, f"holds no {file.name}")
                _unpack_one(opened, entries[file.name], file, folder, archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise _damaged(archive, f"cannot be read ({error})") from error
    except RuntimeError as error:
        raise _damaged(archive, "asks for a password") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # it named a place before its own beginning
            raise _damaged(archive, "cannot be read (it points outside itself)") from error
        raise DownloadError(
            f"{archive.name} could not be unpacked into {folder.name} ({error.strerror}). Check the rights and the "
            f"room there, or put the files themselves there."
        ) from error


def check_directory(archive: Path) -> None:
    """Raises DamagedWeights for a zip whose list of entries would fill the memory."""
    size = directory_bytes(archive)
    if size is None or size > LARGEST_DIRECTORY:
        words = "has no list of entries" if size is None else f"claims a list of entries of {size} bytes"
        raise _damaged(archive, f"{words}, so it is cut short or altered")


def directory_bytes(archive: Path) -> int | None:
    """How long a zip says its list of entries is; None where it does not say."""
    with archive.open("rb") as file:
        length = file.seek(0, 2)
        tail_start = max(0, length - LONGEST_COMMENT - END.size - END_64_LOCATOR.size)
        file.seek(tail_start)
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < END.size:
            return None
        _, size, _ = END.unpack_from(tail, at)
        if at >= END_64_LOCATOR.size:
            signature, start = END_64_LOCATOR.unpack_from(tail, at - END_64_LOCATOR.size)
            if signature == b"PK\6\7":
                # Readers take the record in front of the locator, some the one it points to: the larger counts.
                sizes = [size]
                for place in (start, tail_start + at - END_64_LOCATOR.size - END_64.size):
                    if 0 <= place <= length - END_64.size:
                        file.seek(place)
                        found, large = END_64.unpack(file.read(END_64.size))
                        sizes += [large] if found == b"PK\6\6" else []
                return max(sizes[1:] or sizes)
        return size


def _unpack_one(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, file: WeightFile, folder: Path, archive: Path) -> None:
    if entry.file_size > (file.size or LARGEST):
        raise _damaged(archive, f"claims {entry.file_size} bytes for {file.name}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _damaged(archive, f"packs {file.name} in an unusual way")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.{os.getpid()}.part"
    digest = hashlib.sha256()
    try:
        with opened.open(entry) as packed, part.open("wb") as unpacked:
            while chunk := packed.read(CHUNK):
                digest.update(chunk)
                unpacked.write(chunk)
            unpacked.flush()
            os.fsync(unpacked.fileno())
        if file.sha256 != digest.hexdigest():
            raise _damaged(archive, f"holds another {file.name} than was published (sha256 {digest.hexdigest()})")
        os.replace(part, folder / file.name)
    finally:
        part.unlink(missing_ok=True)


def _damaged(archive: Path, verdict: str) -> DamagedWeights:
    return DamagedWeights(
        f"{archive.parent.name}/{archive.name} {verdict}. Delete it and download it again, or put the files themselves "
        "beside it."
    )
