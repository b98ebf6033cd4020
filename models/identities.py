"""Identities on disk: a safetensors file that says what it holds, and comes back to the bit or not at all.

A file gets its name only when it is whole, and never one that is taken. Reading trusts nothing in a file, and takes
memory for one of MAX_BYTES at most. Format: https://github.com/huggingface/safetensors; the small
pictures go under `ssmd_cover_images`, where ComfyUI's model browser looks for them.
"""

import base64
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import reprlib
import secrets
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import get_args

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ..pulid.encoders import TOKEN_WIDTH
from ..pulid.errors import IdentityFileError, InputError
from ..pulid.identity import PREVIEW_SIZE, PREVIEWS, IdEmbedding, Version
from .checkpoints import recognise
from .locate import not_weights
from .tensors import SAFETENSORS, UNREADABLE, label

FORMAT, FORMAT_VERSION = "PuLID-SDXL identity", "1"
SUFFIX = ".safetensors"
MAX_BYTES = 256 << 20  # about a thousand identities of 32 tokens
MAX_HEADER = 8 << 20  # ours has at most half a megabyte, pictures included; other files are named by theirs

DIGEST, COVERS = "sha256", "ssmd_cover_images"
# What the metadata must say, as regular expressions, and what to know if it does not.
FIELDS = {
    "format_version": (re.escape(FORMAT_VERSION), f"this pack reads {FORMAT_VERSION!r}, a newer pack may read it"),
    "pulid_version": (
        "|".join(map(re.escape, get_args(Version))),
        f"this pack knows {' and '.join(get_args(Version))}",
    ),
    "encoder": (r"[\w.-]{1,64}", "expected the fingerprint of an encoder"),
    "pack_version": (r"[\w.+-]{1,64}", "expected the version of a pack"),
    "created": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "expected a time"),
    DIGEST: (r"[0-9a-f]{64}", "expected 64 hexadecimal digits"),
}

# What safetensors, json and Pillow raise when the bytes of an identity are not what they were.
CORRUPT = (SafetensorError, SyntaxError, zlib.error, Image.DecompressionBombError, *UNREADABLE)

PART = ".pulid-part"  # the ending of a file that is not whole yet
LEFT_BEHIND = 24 * 60 * 60  # s; a part as old as this belongs to no process that still writes it

# What no part of a name may be, since some system cannot hold it or shows it as something else.
NAME_FAULTS = (
    (r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "holds control characters"),
    (r'[<>:"|?*]', 'holds one of < > : " | ? *'),
    (r"^\s|[\s.]$", "begins or ends with a space, or ends with a dot"),
    (r"(?i)^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", "is reserved by Windows"),
)
LONGEST_NAME = 255  # bytes in UTF-8, as file systems have it
LONGEST_STEM = 200  # leaves room for the number and the ending


@dataclass(frozen=True, eq=False)
class StoredIdentity:
    """An identity with what its file says about itself.

    pack     version of the pack that wrote it
    created  day and time, UTC
    """

    identity: IdEmbedding
    pack: str
    created: datetime


# ---- Names ----


def relative_name(name: str, longest: int = LONGEST_NAME) -> Path:
    """A name, perhaps with folders, as a path below an identity folder. Either kind of slash separates.

    Raises InputError for a name that is empty, leads elsewhere, or that some system cannot hold.
    """
    path = PureWindowsPath(name)  # reads both kinds of slash, on every system
    if fault := next(_name_faults(path, longest), None):
        raise InputError(
            f"{name!r} cannot name an identity file: {fault}. Use a plain name such as 'anna', or 'family/anna'."
        )
    return Path(*path.parts)


def _name_faults(path: PureWindowsPath, longest: int) -> Iterator[str]:
    if not path.parts:
        yield "it is empty"
    if path.anchor or ".." in path.parts:
        yield "it leads out of the folder"
    for part in path.parts:
        yield from (f"{part!r} {fault}" for pattern, fault in NAME_FAULTS if re.search(pattern, part))
        if len(part.encode("utf-8", "surrogatepass")) > longest:
            yield f"{part!r} is longer than {longest} bytes"


def find_identity(name: str, folders: Iterable[Path | str]) -> Path:
    """The file of this name in the first of `folders` that has it.

    Raises InputError for a name that leads elsewhere, be it through a link, IdentityFileError if no folder has it.
    """
    relative = relative_name(name)
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        if os.path.lexists(folder / relative):
            _refuse_links(folder, relative)
            if (folder / relative).is_file():
                return folder / relative
    looked = " and ".join(label(folder) for folder in folders)
    raise IdentityFileError(
        f"There is no identity {relative.as_posix()!r} in {looked}. Save it with PuLID Save Identity, or copy "
        "the file there, then refresh ComfyUI's lists and choose it."
    )


def _refuse_links(folder: Path, relative: Path) -> None:
    """Raises InputError if what lies at `relative` below the folder lies elsewhere; the folder itself may be a link."""
    if os.path.normcase(os.path.realpath(folder / relative)) != os.path.normcase(
        Path(os.path.realpath(folder), relative)
    ):
        raise InputError(
            f"{relative.as_posix()!r} in {label(folder)} is a link, or lies behind one, so it could be any file. Put "
            f"the file itself there, or name its folder in extra_model_paths.yaml, under {folder.name}."
        )


# ---- Writing ----


def save(identity: IdEmbedding, folder: Path, name: str, created: datetime, pack: str) -> Path:
    """Write the identity below `folder`, as name_00001_.safetensors or with the next free number; returns the path.

    created  an aware time; the file keeps it in UTC, to the second
    pack     version of this pack, from `pack_version`

    Whatever ends the process meanwhile, there is a whole file under the name or none. Raises InputError for an
    identity that is not whole and for a name or a link that leads elsewhere, IdentityFileError if it cannot be written.
    """
    relative = relative_name(name, LONGEST_STEM)
    content = pack_identity(identity, created, pack)
    target = folder / relative.parent
    _refuse_links(folder, relative.parent)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(target)
        return _write(content, target, relative.name)
    except OSError as error:
        raise IdentityFileError(
            f"The identity could not be saved in {label(target)}: {error.strerror}. Make room there, or choose another "
            "name."
        ) from error


def _write(content: bytes, folder: Path, stem: str) -> Path:
    part = folder / f".{secrets.token_hex(8)}{PART}"
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for number in itertools.count(_next_number(folder, stem)):
            path = folder / f"{stem}_{number:05}_{SUFFIX}"
            try:
                _give_name(part, path)
            except FileExistsError:
                continue
            _sync_folder(folder)
            return path
    finally:
        part.unlink(missing_ok=True)


def _next_number(folder: Path, stem: str) -> int:
    """One more than the highest number of this stem: a number that was deleted does not come back while others last."""
    numbered = re.compile(re.escape(stem) + r"_(\d+)_" + re.escape(SUFFIX), re.IGNORECASE)
    return 1 + max((int(match[1]) for name in os.listdir(folder) if (match := numbered.fullmatch(name))), default=0)


def _give_name(part: Path, path: Path) -> None:
    """The whole file gets its name, in one step. Raises FileExistsError if the name is taken."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # exFAT and some network folders know no second name for a file
        _rename(part, path)


def _rename(part: Path, path: Path) -> None:
    """As a renaming may overwrite, whoever of our processes made the claim first may look and rename."""
    claim = path.with_name(f".{path.name}{PART}")
    claim.open("xb").close()
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        part.rename(path)
    finally:
        claim.unlink()


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows writes its folders through, and cannot open them
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_left_behind(folder: Path) -> None:
    """Parts of files whose process was ended while it wrote them."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):  # another process's, which has just become a file, or may not be removed
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()


def pack_version() -> str:
    """Version of this pack, from the only place that states it: pyproject.toml, which comes with every copy."""
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]


# ---- Content ----


def pack_identity(identity: IdEmbedding, created: datetime, pack: str) -> bytes:
    """The content of an identity file. Raises InputError for an identity that `unpack_identity` would refuse."""
    tensors = {"cond": identity.cond.contiguous(), "uncond": identity.uncond.contiguous()}
    fault = _tensor_fault(tensors)
    if fault or sum(tensor.nbytes for tensor in tensors.values()) > MAX_BYTES - MAX_HEADER:
        raise InputError(f"The identity cannot be saved: {fault or f'it has more than {MAX_BYTES >> 20} MB'}.")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "pulid_version": identity.version,
        "encoder": identity.encoder,
        "pack_version": pack,
        "created": created.astimezone(timezone.utc).isoformat(timespec="seconds"),
    }
    if identity.preview is not None:
        metadata[COVERS] = json.dumps([_to_png(picture) for picture in identity.preview])
    metadata[DIGEST] = _digest(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def load(path: Path) -> StoredIdentity:
    """Read an identity file. Raises IdentityFileError with what the file is instead, or what is wrong with it."""
    try:
        metadata, content = _read(path)
        return _unpack(path, metadata, safetensors.torch.load(content))
    except CORRUPT as error:
        reason = getattr(error, "strerror", None)  # what the disk says; the content gives none
        raise _refusal(path, f"cannot be read ({reason})" if reason else "is cut short or altered") from error


def content_digest(path: Path) -> str:
    """Tells a changed file from the same one, whatever its times say; reads no more than `load` would."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(MAX_BYTES)).hexdigest()


def _read(path: Path) -> tuple[dict[str, str], bytes]:
    """The metadata and all bytes of a file that says it is an identity; of any other, only the header is read."""
    with path.open("rb") as file:
        head = file.read(64)
        if not re.match(SAFETENSORS, head):
            raise _refusal(path, not_weights(head) or f"begins with {head[:12]!r}, which is not safetensors")
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER:
            raise _refusal(path, f"has a header of {length} bytes, which no identity has")
        file.seek(8)
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        if metadata.get("format") != FORMAT:
            raise _foreign(path, header)
        file.seek(0)
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise _refusal(path, f"has more than {MAX_BYTES >> 20} MB, which no identity has")
    return metadata, content


def _unpack(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> StoredIdentity:
    for field, (pattern, meaning) in FIELDS.items():
        found = str(metadata.get(field, ""))
        if not re.fullmatch(pattern, found):
            raise _refusal(path, f"has {reprlib.repr(found)} for {field}; {meaning}")
    if metadata[DIGEST] != _digest(tensors, metadata):
        raise _refusal(path, "was altered after it was saved: its content does not have the checksum it states")
    if fault := _tensor_fault(tensors):
        raise _refusal(path, f"holds no whole identity: {fault}")
    preview = None
    if COVERS in metadata:
        preview = torch.stack([_from_png(picture) for picture in json.loads(metadata[COVERS])[:PREVIEWS]])
    identity = IdEmbedding(tensors["cond"], tensors["uncond"], metadata["pulid_version"], metadata["encoder"], preview)
    return StoredIdentity(identity, metadata["pack_version"], datetime.fromisoformat(metadata["created"]))


def _foreign(path: Path, header: Mapping) -> IdentityFileError:
    """The error for another kind of safetensors, told by the names and shapes of its tensors."""
    shapes = {
        name: SimpleNamespace(shape=entry["shape"])
        for name, entry in header.items()
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list)
    }
    kind = recognise(shapes)
    found = f"{kind.title}. {kind.remedy}" if kind else "tensors of something else. Choose another file."
    return IdentityFileError(f"Expected an identity that PuLID Save Identity saved, but {label(path)} holds {found}")


def _refusal(path: Path, verdict: str) -> IdentityFileError:
    return IdentityFileError(
        f"Expected an identity that PuLID Save Identity saved, but {label(path)} {verdict}. Choose another file, or "
        "encode the person again and save."
    )


def _tensor_fault(tensors: Mapping[str, Tensor]) -> str | None:
    """Why these are not `cond` (R, T, D) and `uncond` (1, T, D) of an identity, or None."""
    if set(tensors) != {"cond", "uncond"}:
        return f"expected the tensors cond and uncond, found {reprlib.repr(sorted(tensors))}"
    shape = tensors["cond"].shape
    if len(shape) != 3 or 0 in shape or shape[2] != TOKEN_WIDTH:
        return f"expected cond of shape (identities, tokens, {TOKEN_WIDTH}), found {tuple(shape)}"
    if tensors["uncond"].shape != (1, *shape[1:]):
        return f"expected uncond of shape {(1, *shape[1:])}, found {tuple(tensors['uncond'].shape)}"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            return f"expected {name} in float32, found {tensor.dtype}"
        if not tensor.isfinite().all():
            return f"{name} holds NaN or infinite values"
    return None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over everything a file says: its tensors with names, dtypes and shapes, and its other metadata."""
    said = {field: value for field, value in metadata.items() if field != DIGEST}
    held = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([said, held], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _to_png(picture: Tensor) -> str:
    assert picture.shape == (PREVIEW_SIZE, PREVIEW_SIZE, 3), "previews come from thumbnails()"
    content = io.BytesIO()
    Image.fromarray(picture.numpy()).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def _from_png(text: str) -> Tensor:
    """(PREVIEW_SIZE, PREVIEW_SIZE, 3) uint8. Raises ValueError for any other picture, before it is unpacked."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
        if picture.size != (PREVIEW_SIZE, PREVIEW_SIZE):
            raise ValueError(f"a preview of {picture.size} px")
        return torch.from_numpy(np.array(picture.convert("RGB")))
