"""Identities on disk: safetensors files that say what they hold, and come back to the bit or not at all.

A card (identity_card.py) is a picture with such a file inside. A file gets its name when it is whole, and never one
that is taken. The small pictures in its metadata go under `ssmd_cover_images`, where ComfyUI's model browser looks.
Format: https://github.com/huggingface/safetensors
"""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import reprlib
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PureWindowsPath
from typing import get_args

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ..pulid.encoders import ARCFACE_WIDTH, TOKEN_WIDTH
from ..pulid.errors import IdentityFileError, InputError
from ..pulid.identity import PREVIEW_SIZE, PREVIEWS, IdEmbedding, Version
from .checkpoints import recognise
from .identity_card import PICTURE, card_content, make_card
from .locate import not_weights
from .tensors import SAFETENSORS, label, system_trouble, unread

FORMAT = "PuLID-SDXL identity"
PLAIN_VERSION, FORMAT_VERSION = "1", "2"  # without and with the recogniser's view of the people beside their tokens
SUFFIX, CARD_SUFFIX = ".safetensors", ".png"
LARGEST = 256 << 20  # bytes; about a thousand identities of 32 tokens
LARGEST_HEADER = 2 << 20  # bytes; ours has 0.6 MB with eight pictures. Parsed, it takes up to 30 times as much
DIGEST, COVERS = "sha256", "ssmd_cover_images"
# What the metadata must say, as regular expressions, and what to know if it does not.
FIELDS = {
    "format_version": (f"{PLAIN_VERSION}|{FORMAT_VERSION}", "this pack reads '1' and '2', a newer pack may read it"),
    "pulid_version": (r"v1|v1\.1", f"this pack knows {' and '.join(get_args(Version))}"),
    "encoder": (r"[\w.-]{1,64}", "expected the fingerprint of an encoder"),
    "pack_version": (r"[\w.+-]{1,64}", "expected the version of a pack"),
    "created": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "expected a time"),
    DIGEST: (r"[0-9a-f]{64}", "expected 64 hexadecimal digits"),
}
PART = ".pulid-part"  # the ending of a file that is not whole yet
LEFT_BEHIND = 24 * 60 * 60  # s; a part as old as this belongs to no process that still writes it
# What no part of a name may be, since some system cannot hold it or shows it as something else.
NAME_FAULTS = (
    (r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "holds control characters"),
    (r'[<>:"|?*]', 'holds one of < > : " | ? *'),
    (r"^\s|[\s.]$", "begins or ends with a space, or ends with a dot"),
    (r"(?i)^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", "is reserved by Windows"),
)
LONGEST_NAME, LONGEST_STEM = 255, 200  # bytes in UTF-8: of a name, and of one that gets a number and an ending


@dataclass(frozen=True, eq=False)
class StoredIdentity:
    """An identity with what its file says about itself."""

    identity: IdEmbedding
    pack: str  # version of the pack that wrote it
    created: datetime  # UTC


def relative_name(name: str, longest: int = LONGEST_NAME) -> Path:
    """A name, perhaps with folders, as a path below an identity folder. Either kind of slash separates.

    Raises InputError for a name that is empty, leads elsewhere, or that some system cannot hold.
    """
    path = PureWindowsPath(name)  # reads both kinds of slash, on every system
    faults = [f"{part!r} {fault}" for part in path.parts for pattern, fault in NAME_FAULTS if re.search(pattern, part)]
    if not path.parts:
        faults = ["it is empty"]
    elif path.anchor or ".." in path.parts:
        faults = ["it leads out of the folder"]
    elif any(len(part.encode("utf-8", "surrogatepass")) > longest for part in path.parts):
        faults.append(f"a part of it is longer than {longest} bytes")
    if faults:
        raise InputError(
            f"{name!r} cannot name an identity file: {faults[0]}. Use a plain name such as 'anna', or 'family/anna'."
        )
    return Path(*path.parts)


def find_identity(name: str, folders: Iterable[Path]) -> Path:
    """The file of this name in the first of `folders` that has it.

    Raises InputError for a name that leads elsewhere, be it through a link, IdentityFileError if no folder has it.
    """
    relative, folders = relative_name(name), list(folders)
    for folder in folders:
        if os.path.lexists(folder / relative):
            _refuse_links(folder, relative)
            if (folder / relative).is_file():
                return folder / relative
    raise IdentityFileError(
        f"There is no identity {relative.as_posix()!r} in {' and '.join(map(label, folders))}. Save it with PuLID Save "
        "Identity, or copy the file there, then refresh ComfyUI's lists and choose it."
    )


def _refuse_links(folder: Path, relative: Path) -> None:
    """Raises InputError if what lies at `relative` below the folder lies elsewhere; the folder itself may be a link."""
    if Path(os.path.realpath(folder / relative)) != Path(os.path.realpath(folder), relative):
        raise InputError(
            f"{relative.as_posix()!r} in {label(folder)} is a link, or lies behind one, so it could be any file. Put "
            f"the file itself there, or name its folder in extra_model_paths.yaml, under {folder.name}."
        )


def save(identity: IdEmbedding, folder: Path, name: str, created: datetime, pack: str, card: bool = False) -> Path:
    """Write the identity below `folder`, as name_00001_.safetensors or with the next free number; returns the path.

    created  an aware time; the file keeps it in UTC, to the second
    pack     version of this pack, from `pack_version`
    card     as name_00001_.png: a picture of the faces with that file inside

    Whatever ends the process meanwhile, there is a whole file under the name or none. Raises InputError for an
    identity that is not whole and for a name or a link that leads elsewhere, IdentityFileError if it cannot be written.
    """
    relative = relative_name(name, LONGEST_STEM)
    content = pack_identity(identity, created, pack)
    if card:
        content = make_card(content, identity.preview, f"PuLID {identity.version} identity, {created:%Y-%m-%d}")
    target = folder / relative.parent
    _refuse_links(folder, relative.parent)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(target)
        return _write(content, target, relative.name, CARD_SUFFIX if card else SUFFIX)
    except OSError as error:
        raise IdentityFileError(
            f"The identity could not be saved in {label(target)}: {error.strerror}. Make room there, or choose another "
            "name."
        ) from error


def _write(content: bytes, folder: Path, stem: str, suffix: str) -> Path:
    part = folder / f".{secrets.token_hex(8)}{PART}"
    numbered = re.compile(rf"{re.escape(stem)}_(\d+)_({re.escape(SUFFIX)}|{re.escape(CARD_SUFFIX)})", re.IGNORECASE)
    highest = max((int(match[1]) for name in os.listdir(folder) if (match := numbered.fullmatch(name))), default=0)
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for number in itertools.count(highest + 1):
            path = folder / f"{stem}_{number:05}_{suffix}"
            with contextlib.suppress(FileExistsError):
                _give_name(part, path)
                return path
        raise AssertionError("numbers do not end")
    finally:
        part.unlink(missing_ok=True)


def _give_name(part: Path, path: Path) -> None:
    """The whole file gets its name, in one step. Raises FileExistsError if the name is taken."""
    try:
        os.link(part, path)
        return
    except FileExistsError:
        raise
    except OSError:  # exFAT and some network folders know no second name for a file
        claim = path.with_name(f".{path.name}{PART}")
    claim.open("xb").close()  # a renaming may overwrite: whichever of our processes made the claim may look and rename
    try:
        if os.path.lexists(path):
            raise FileExistsError
        part.rename(path)
    finally:
        claim.unlink()


def _remove_left_behind(folder: Path) -> None:
    """Parts of files whose process was ended while it wrote them."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):  # another process's, which has just become a file, or may not be removed
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()


def pack_version() -> str:
    """Version of this pack, from the only place that states it: pyproject.toml, which comes with every copy."""
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else "unknown"


def pack_identity(identity: IdEmbedding, created: datetime, pack: str, largest: int = LARGEST) -> bytes:
    """The content of an identity file. Raises InputError for an identity that `load` would refuse."""
    tensors = {"cond": identity.cond.contiguous(), "uncond": identity.uncond.contiguous()}
    if identity.arcface is not None:
        tensors["arcface"] = identity.arcface.contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": PLAIN_VERSION if identity.arcface is None else FORMAT_VERSION,
        "pulid_version": identity.version,
        "encoder": identity.encoder,
        "pack_version": pack,
        "created": created.astimezone(timezone.utc).isoformat(timespec="seconds"),
    }
    if identity.preview is not None:
        metadata[COVERS] = json.dumps([_to_png(picture) for picture in identity.preview])
    if fault := _fault(tensors):
        raise InputError(f"The identity cannot be saved: {fault}.")
    metadata[DIGEST] = _digest(tensors, metadata)
    content = safetensors.torch.save(tensors, metadata)
    if len(content) > largest:
        raise InputError(f"The identity cannot be saved: it has more than {largest >> 20} MB.")
    return content


def load(path: Path, largest: int = LARGEST) -> StoredIdentity:
    """Read an identity file or card of at most `largest` bytes, allocating no more than it has and a hundred MB.

    Raises IdentityFileError with what the file is instead, what is wrong with it, or what kept it from being read.
    """
    try:
        with _taken_out(path, largest) as file:
            metadata, tensors = _read(path, file, largest)
        return _unpack(path, metadata, tensors)
    except IdentityFileError:
        raise
    except Exception as error:  # whatever safetensors, json and Pillow make of bytes that are not what they were
        if trouble := system_trouble(error):
            raise IdentityFileError(str(unread(path, trouble))) from error
        raise _refusal(path, "is cut short or altered") from error


def content_digest(path: Path, largest: int = LARGEST) -> str:
    """A hash of the file's content, whatever its times say; of as many bytes as `load` would read."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(largest)).hexdigest()


@contextlib.contextmanager
def _taken_out(path: Path, largest: int) -> Iterator[Path]:
    """The safetensors file: `path` itself, or what lies in the card, taken out for as long as the context lasts."""
    with path.open("rb") as opened:
        if not PICTURE.match(opened.read(16)):
            yield path
            return
        opened.seek(0)
        content = card_content(opened.read(largest))
    if content is None:
        raise IdentityFileError(
            f"Expected an identity card that PuLID Save Identity saved, but the picture {label(path)} carries no "
            "identity. If it was a card, a program that saved it anew, as image editors, chats and websites do, has "
            "dropped it. Use the file as it was saved, or encode the person again."
        )
    with tempfile.TemporaryDirectory() as folder:  # which only this user may enter
        inside = Path(folder, "identity")
        inside.write_bytes(content)
        del content
        yield inside


def _read(path: Path, inside: Path, largest: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of the file `inside`; of one that is no identity, only the header is read."""
    with inside.open("rb") as opened:
        head = opened.read(64)
    if not re.match(SAFETENSORS, head):
        raise _refusal(path, not_weights(head) or f"begins with {head[:12]!r}, which is not safetensors")
    if (header := int.from_bytes(head[:8], "little")) > LARGEST_HEADER:
        raise _refusal(path, f"has a header of {header} bytes, which no identity has")
    with safe_open(inside, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict); mapped, not read
        if metadata.get("format") != FORMAT:
            kind = recognise(tensors)
            found = f"{kind.title}. {kind.remedy}" if kind else "tensors of something else. Choose another file."
            raise IdentityFileError(
                f"Expected an identity that PuLID Save Identity saved, but {label(path)} holds {found}"
            )
        if inside.stat().st_size > largest:
            raise _refusal(path, f"has more than {largest >> 20} MB, which no identity has")
        return metadata, {name: tensor.clone() for name, tensor in tensors.items()}


def _unpack(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> StoredIdentity:
    for field, (pattern, meaning) in FIELDS.items():
        found = str(metadata.get(field, ""))
        if not re.fullmatch(pattern, found):
            raise _refusal(path, f"has {reprlib.repr(found)} for {field}; {meaning}")
    if metadata[DIGEST] != _digest(tensors, metadata):
        raise _refusal(path, "was altered after it was saved: its content does not have the checksum it states")
    if fault := _fault(tensors):
        raise _refusal(path, f"holds no whole identity: {fault}")
    preview = None
    if COVERS in metadata:
        preview = torch.stack([_from_png(picture) for picture in json.loads(metadata[COVERS])[:PREVIEWS]])
    version = next(known for known in get_args(Version) if known == metadata["pulid_version"])
    identity = IdEmbedding(
        tensors["cond"], tensors["uncond"], version, metadata["encoder"], preview, tensors.get("arcface")
    )
    return StoredIdentity(identity, metadata["pack_version"], datetime.fromisoformat(metadata["created"]))


def _refusal(path: Path, verdict: str) -> IdentityFileError:
    return IdentityFileError(
        f"Expected an identity that PuLID Save Identity saved, but {label(path)} {verdict}. Choose another file, or "
        "encode the person again and save."
    )


def _fault(tensors: Mapping[str, Tensor]) -> str | None:
    """Why these are not `cond` (R, T, D), `uncond` (1, T, D) and perhaps `arcface` (R, 512) of an identity, or None."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    cond = shapes.get("cond", ())
    expected = {"cond": cond, "uncond": (1, *cond[1:])}
    if "arcface" in tensors:
        expected["arcface"] = (*cond[:1], ARCFACE_WIDTH)
    if shapes != expected or len(cond) != 3 or 0 in cond or cond[2] != TOKEN_WIDTH:
        return (
            f"expected cond (identities, tokens, {TOKEN_WIDTH}) and uncond (1, tokens, {TOKEN_WIDTH}), perhaps "
            f"with arcface (identities, {ARCFACE_WIDTH}), "
            f"found {reprlib.repr(shapes)}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            return f"expected {name} in float32, found {tensor.dtype}"
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both; no copy is made
            return f"{name} holds NaN or infinite values"
    return None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over everything a file says: its tensors with names, dtypes and shapes, and its other metadata."""
    said = {field: value for field, value in metadata.items() if field != DIGEST}
    held = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([said, held], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
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
