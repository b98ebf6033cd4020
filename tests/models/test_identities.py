"""Identity files: what comes back, where they go, and what a file that is not one is told."""

import base64
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from pulid_sdxl.models import identities
from pulid_sdxl.models.identities import find_identity, load, pack_version, save
from pulid_sdxl.pulid.errors import IdentityFileError, InputError
from pulid_sdxl.pulid.identity import PREVIEW_SIZE, IdEmbedding
from pulid_sdxl.tools import ROOT, TOOLS
from pulid_sdxl.tools.fakes.damage import damages
from safetensors import safe_open

NOON = datetime(2025, 6, 1, 14, 0, 0, 123456, timezone(timedelta(hours=2)))


def identity(rows=1, tokens=10, version="v1", faces=1):
    generator = torch.Generator().manual_seed(tokens)
    preview = torch.randint(0, 256, (faces, PREVIEW_SIZE, PREVIEW_SIZE, 3), generator=generator, dtype=torch.uint8)
    return IdEmbedding(
        torch.randn(rows, tokens, 2048, generator=generator),
        torch.randn(1, tokens, 2048, generator=generator),
        version,
        "0123456789abcdef",
        preview if faces else None,
    )


def keep(folder, name="anna", **options):
    return save(identity(**options), folder, name, NOON, "1.2.3")


def content_of(path):
    """The metadata and the tensors, as safetensors itself reads them."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def refusal(path):
    """The message with which a file is refused: it names the file, and not the private path."""
    with pytest.raises(IdentityFileError) as caught:
        load(path)
    message = str(caught.value)
    assert path.name in message
    assert str(path.parent.parent) not in message
    return message


# ---- There and back ----


@pytest.mark.parametrize("options", [{"faces": 0}, {"faces": 8, "rows": 3}, {"version": "v1.1", "tokens": 32}], ids=str)
def test_an_identity_comes_back_to_the_bit(tmp_path, options):
    made = identity(**options)
    made.cond[0, 0, :3] = torch.tensor([-0.0, 1e-45, 3.4e38])  # values that arithmetic would change
    path = save(made, tmp_path, "anna", NOON, "1.2.3")

    stored = load(path)
    path.write_bytes(bytes(path.stat().st_size))  # what is loaded does not depend on its file

    for name in ("cond", "uncond"):
        assert getattr(stored.identity, name).numpy().tobytes() == getattr(made, name).numpy().tobytes()
    assert (stored.identity.version, stored.identity.encoder) == (made.version, made.encoder)
    assert (made.preview is None) == (stored.identity.preview is None)
    assert made.preview is None or torch.equal(stored.identity.preview, made.preview)
    assert (stored.pack, stored.created) == ("1.2.3", datetime(2025, 6, 1, 12, tzinfo=timezone.utc))


def test_a_file_says_what_it_is_to_any_reader_of_safetensors(tmp_path):
    metadata, tensors = content_of(keep(tmp_path))

    assert set(tensors) == {"cond", "uncond"}
    assert torch.equal(tensors["cond"], identity().cond)
    [cover] = json.loads(metadata.pop("ssmd_cover_images"))
    assert Image.open(io.BytesIO(base64.b64decode(cover))).size == (128, 128)
    assert re.fullmatch("[0-9a-f]{64}", metadata.pop("sha256"))
    assert metadata == {
        "format": "PuLID-SDXL identity",
        "format_version": "1",
        "pulid_version": "v1",
        "encoder": "0123456789abcdef",
        "pack_version": "1.2.3",
        "created": "2025-06-01T12:00:00+00:00",
    }


def test_a_file_of_format_1_loads_whatever_wrote_it(tmp_path):
    """Written by hand; its checksum was made by the first version of this pack."""
    path, cond = tmp_path / "old.safetensors", torch.arange(2048.0).view(1, 1, 2048)
    said = {
        "encoder": "0123456789abcdef",
        "pack_version": "0.1.0",
        "pulid_version": "v1.1",
        "sha256": "f07768caef965543c76f2891608cb50528e5945e1b6d3b5d52f117f341fdb48d",
        "format": "PuLID-SDXL identity",
        "format_version": "1",
        "created": "2025-06-01T12:00:00+00:00",
    }
    safetensors.torch.save_file({"cond": cond, "uncond": -cond}, path, said)

    assert torch.equal(load(path).identity.cond, cond)
    assert load(path).identity.arcface is None


def test_what_the_recogniser_saw_comes_back_to_the_bit(tmp_path):
    made = replace(identity(), arcface=torch.nn.functional.normalize(torch.randn(len(identity().cond), 512), dim=1))
    path = save(made, tmp_path, "anna", NOON, "1.2.3")
    assert content_of(path)[0]["format_version"] == "2"
    assert torch.equal(load(path).identity.arcface, made.arcface)


@pytest.mark.parametrize("arcface", [torch.zeros(3, 512), torch.zeros(1, 511), torch.zeros(1, 512).half()])
def test_a_view_of_the_recogniser_that_is_none_is_refused(tmp_path, arcface):
    with pytest.raises(InputError, match="arcface"):
        save(replace(identity(), arcface=arcface), tmp_path, "anna", NOON, "1.2.3")


def test_the_version_of_the_pack_is_that_of_its_pyproject():
    tomllib = pytest.importorskip("tomllib")

    assert pack_version() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


# ---- Names ----


BAD_NAMES = {
    "": "it is empty",
    "./": "it is empty",
    "anna ": "begins or ends with a space",
    "anna.": "ends with a dot",
    "a/../../anna": "leads out",
    "a\\..\\anna": "leads out",
    "/etc/passwd": "leads out",
    "C:anna": "leads out",
    "//server/share/anna": "leads out",
    "an\0na": "control characters",
    "an\u202ena": "control characters",
    "an\ud800na": "control characters",
    "ab:c/anna": "holds one of",
    "nul.safetensors": "reserved by Windows",
    "aux/anna": "reserved by Windows",
    "LPT9 .x": "reserved by Windows",
    "é" * 128: r"longer than \d+ bytes",
}


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_or_fits_no_file_is_refused(tmp_path, name):
    folder = tmp_path / "pulid_identities"

    for use in (lambda: find_identity(name, [folder]), lambda: keep(folder, name)):
        with pytest.raises(InputError, match=f"cannot name an identity file: .*{BAD_NAMES[name]}"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Anna Müller", "安娜", "family/anna", "family\\anna", "console", ".a", "a" * 200])
def test_a_plain_name_with_or_without_folders_serves(tmp_path, name):
    path = keep(tmp_path, name)

    assert path == tmp_path / (name.replace("\\", "/") + "_00001_.safetensors")
    assert find_identity(f"{name}_00001_.safetensors", [tmp_path]) == path
    with pytest.raises(InputError, match="longer than 200 bytes"):
        keep(tmp_path, "a" * 201)


def test_the_first_folder_that_has_the_file_serves_and_else_all_are_named(tmp_path):
    folders = [tmp_path / place / "pulid_identities" for place in ("models", "output", "third")]
    path = keep(folders[1])
    keep(folders[2])

    assert find_identity("anna_00001_.safetensors", folders) == path
    words = r"'bob_00001_\.safetensors' in models/pulid_identities and output/pulid_identities\."
    with pytest.raises(IdentityFileError, match=words) as refusal:
        find_identity("bob_00001_.safetensors", folders[:2])
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize(("what", "inside"), [("file", True), ("file", False), ("folder", False), ("nothing", True)])
def test_a_link_is_refused_as_a_name(tmp_path, what, inside):
    folder = tmp_path / "output" / "pulid_identities"
    elsewhere = folder / "real" if inside else tmp_path / "elsewhere"
    path = keep(elsewhere)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "link").symlink_to({"file": path, "folder": elsewhere, "nothing": elsewhere / "gone"}[what])
    name = "link/anna_00001_.safetensors" if what == "folder" else "link"

    with pytest.raises(InputError, match=r"'link.*' in output/pulid_identities is a link, or lies behind one"):
        find_identity(name, [folder])
    with pytest.raises(InputError, match="is a link"):
        keep(folder, "link/new/anna")
    assert list(elsewhere.iterdir()) == [path]


def test_the_folder_itself_may_be_a_link_and_a_pipe_does_not_hang(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "pulid_identities").symlink_to(tmp_path / "drive")
    os.mkfifo(tmp_path / "drive" / "pipe")

    assert find_identity(keep(tmp_path / "pulid_identities").name, [tmp_path / "pulid_identities"])
    with pytest.raises(IdentityFileError, match="There is no identity 'pipe'"):
        find_identity("pipe", [tmp_path / "pulid_identities"])


# ---- Saving ----


@pytest.mark.parametrize("there", ["anna_00007_.safetensors", "ANNA_00007_.SAFETENSORS", "anna_7_.safetensors"])
def test_numbers_go_on_after_the_highest_and_nothing_is_overwritten(tmp_path, there):
    for name in (there, "anna_b_00030_.safetensors", "anna_00031_.jpg"):
        (tmp_path / name).write_bytes(b"mine")

    assert [keep(tmp_path).name, keep(tmp_path).name] == ["anna_00008_.safetensors", "anna_00009_.safetensors"]
    assert (tmp_path / there).read_bytes() == b"mine"


def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["", "a file system without links"])
@pytest.mark.parametrize("there", ["file", "folder", "dangling link", "another's claim"])
def test_a_name_taken_meanwhile_goes_to_whoever_was_first(tmp_path, monkeypatch, there, links):
    taken = tmp_path / "anna_00001_.safetensors"
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # it comes after the highest number was looked for
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if there == "another's claim":
        taken = taken.with_name(f".{taken.name}.pulid-part")  # of one that finds no links
    if there == "folder":
        taken.mkdir()
    elif there == "dangling link":
        taken.symlink_to(tmp_path / "gone")
    else:
        taken.write_bytes(b"theirs")

    path = keep(tmp_path)
    monkeypatch.undo()

    assert path.name == f"anna_0000{1 if links and 'claim' in there else 2}_.safetensors"
    assert torch.equal(load(path).identity.cond, identity().cond)
    assert not taken.is_file() or taken.read_bytes() == b"theirs"
    assert set(tmp_path.iterdir()) == {taken, path}


@pytest.mark.parametrize(("step", "error", "told", "words"), [
    ("fsync", OSError(errno.ENOSPC, "No space left"), IdentityFileError, "could not be saved in .*: No space left"),
    ("link", KeyboardInterrupt(), KeyboardInterrupt, None),
])  # fmt: skip
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, step, error, told, words):
    def fails(*_):
        raise error

    monkeypatch.setattr(os, step, fails)

    with pytest.raises(told, match=words):
        keep(tmp_path / "output" / "pulid_identities")
    assert list((tmp_path / "output" / "pulid_identities").iterdir()) == []


@pytest.mark.parametrize(("change", "fault"), [
    ({"cond": torch.full((1, 10, 2048), float("nan"))}, "cond holds NaN"),
    ({"uncond": torch.zeros(1, 9, 2048)}, r"expected cond .* found .*'uncond': \(1, 9, 2048\)"),
    ({"cond": torch.zeros(1, 10, 2048).half()}, "expected cond in float32, found torch.float16"),
])  # fmt: skip
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, change, fault):
    with pytest.raises(InputError, match=f"The identity cannot be saved: {fault}"):
        save(replace(identity(), **change), tmp_path / "new", "anna", NOON, "1.2.3")
    assert not (tmp_path / "new").exists()


def test_a_file_too_large_is_neither_saved_nor_read_to_its_end(tmp_path):
    path = keep(tmp_path)
    size = path.stat().st_size

    assert load(path, size) and identities.pack_identity(identity(), NOON, "1.2.3", size)
    with pytest.raises(InputError, match="it has more than 0 MB"):
        identities.pack_identity(identity(), NOON, "1.2.3", size - 1)
    with pytest.raises(IdentityFileError, match="has more than 0 MB"):
        load(path, size - 1)


def test_parts_left_behind_go_after_a_day_and_nothing_else_does(tmp_path):
    old, fresh, other, gone = (tmp_path / name for name in (".a.pulid-part", ".b.pulid-part", "c", ".d.pulid-part"))
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    gone.symlink_to(tmp_path / "gone")  # listed, and not there when it is looked at

    path = keep(tmp_path)

    assert set(tmp_path.iterdir()) == {fresh, other, gone, path}
    assert path.stat().st_mode == fresh.stat().st_mode  # as readable as any other


# What a process of its own needs to save into a folder, on either kind of file system.
SAVING = """
import os, signal, sys, time
from datetime import datetime, timezone
from pathlib import Path
import torch
from pulid_sdxl.models import identities
from pulid_sdxl.pulid.identity import IdEmbedding

def no_links(*_):
    raise PermissionError(1, "Operation not permitted")

def save(folder):
    made = IdEmbedding(torch.ones(1, 32, 2048), torch.zeros(1, 32, 2048), "v1.1", "print")
    return identities.save(made, folder, "anna", datetime.now(timezone.utc), "1")

torch.set_num_threads(1)
folder = Path(sys.argv[1])
if sys.argv[2] == "without links":
    os.link = no_links
"""
# Ends itself at every line that runs while a file is written, in a process of its own each time.
KILL = """
def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename != identities.__file__ or frame.f_code.co_name not in ("save", "_write", "_give_name"):
        return None
    left -= event == "line"
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

line, status = 0, signal.SIGKILL
while os.WIFSIGNALED(status):
    left = line = line + 1
    if (pid := os.fork()) == 0:
        sys.settrace(trace)
        save(folder / str(line))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
"""
# Saves 25 times as soon as the other process is ready too.
SAVE_OFTEN = """
ready = Path(sys.argv[3])
(ready / sys.argv[4]).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
for _ in range(25):
    print(save(folder).name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed as POSIX does it")
@pytest.mark.parametrize("file_system", ["with links", "without links"])
def test_killing_the_process_leaves_a_whole_file_or_none(tmp_path, file_system):
    subprocess.run([sys.executable, TOOLS, "-c", SAVING + KILL, tmp_path, file_system], check=True)

    found = set()
    for folder in tmp_path.iterdir():
        named, parts = list(folder.glob("*.safetensors")), list(folder.glob(".*.pulid-part"))
        assert len(list(folder.iterdir())) == len(named) + len(parts)
        for path in named:
            assert torch.equal(load(path).identity.cond[-1], torch.ones(32, 2048))
        found.add((len(named), len(parts)))
    assert {(0, 0), (0, 1), (1, 1), (1, 0)} <= found  # before, while writing, between the names, after


@pytest.mark.parametrize("file_system", ["with links", "without links"])
def test_processes_that_save_at_once_get_a_file_each(tmp_path, file_system):
    ready, folder = tmp_path / "ready", tmp_path / "pulid_identities"
    ready.mkdir()
    run = [sys.executable, TOOLS, "-c", SAVING + SAVE_OFTEN, folder, file_system, ready]
    processes = [subprocess.Popen([*run, name], stdout=subprocess.PIPE, text=True) for name in ("first", "second")]
    names = [name for process in processes for name in process.communicate(timeout=60)[0].split()]

    assert len(set(names)) == 50
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert all(load(folder / name).identity.tokens == 32 for name in names)


# ---- What is no identity file ----


def rewritten(folder, tensors=None, name="anna.safetensors", **metadata):
    """A file whose checksum is right, made by whoever knows how: only what it says is wrong."""
    path = folder / name
    whole, said = content_of(keep(folder, "whole"))[::-1]
    tensors = whole if tensors is None else tensors
    said = {field: value for field, value in (said | metadata).items() if value is not None}
    said["sha256"] = metadata.get("sha256", identities._digest(tensors, said))
    safetensors.torch.save_file(tensors, path, said)
    return path


@pytest.mark.parametrize("faces", [0, 2])
def test_a_damaged_file_is_refused_in_words_or_says_the_same(tmp_path, faces):
    path = keep(tmp_path, faces=faces)
    whole, expected = path.read_bytes(), load(path).identity
    assert load(rewritten(tmp_path)).identity.tokens == 10  # with nothing changed

    for content in damages(whole, 600):
        path.write_bytes(content)
        try:
            found = load(path).identity
        except IdentityFileError as error:
            assert path.name in str(error) and len(str(error)) < 500
        else:
            assert torch.equal(found.cond, expected.cond) and torch.equal(found.uncond, expected.uncond)
    path.write_bytes(whole + bytes(4))
    assert "is cut short or altered" in refusal(path)


WRONG_CONTENT = {
    "found {'cond': (1, 10, 2048)}": lambda t: t.pop("uncond"),
    "'cond': (1, 10, 1024)": lambda t: t.update(cond=torch.zeros(1, 10, 1024)),
    "'cond': (10, 2048)": lambda t: t.update(cond=torch.zeros(10, 2048)),
    "'cond': (0, 10, 2048)": lambda t: t.update(cond=torch.zeros(0, 10, 2048)),
    "'uncond': (1, 20, 2048)": lambda t: t.update(uncond=torch.zeros(1, 20, 2048)),
    "expected cond in float32, found torch.float16": lambda t: t.update(cond=t["cond"].half()),
    "uncond holds NaN or infinite values": lambda t: t["uncond"][0, 3].fill_(float("inf")),
}


@pytest.mark.parametrize("fault", WRONG_CONTENT)
def test_wrong_tensors_are_refused_even_with_the_right_checksum(tmp_path, fault):
    tensors = content_of(keep(tmp_path))[1]
    WRONG_CONTENT[fault](tensors)

    assert fault in refusal(rewritten(tmp_path, tensors))


@pytest.mark.parametrize(("field", "value", "words"), [
    ("format_version", "3", "has '3' for format_version; this pack reads '1' and '2', a newer pack may read it"),
    ("pulid_version", "v2", "has 'v2' for pulid_version; this pack knows v1 and v1.1"),
    ("encoder", "e" * 10000, "for encoder; expected the fingerprint"),
    ("created", "yesterday", "has 'yesterday' for created; expected a time"),
    ("created", "2025-13-01T00:00:00+00:00", "is cut short or altered"),
    ("sha256", "0" * 64, "was altered after it was saved"),
    ("ssmd_cover_images", '["QUJD"]', "is cut short or altered"),
    ("ssmd_cover_images", "[" * 100_000, "is cut short or altered"),
])  # fmt: skip
def test_wrong_metadata_is_refused_even_with_the_right_checksum(tmp_path, field, value, words):
    message = refusal(rewritten(tmp_path, **{field: value}))

    assert words in message
    assert len(message) < 400


@pytest.mark.parametrize(("size", "kind"), [((128, 129), "PNG"), ((30_000, 30_000), "PNG"), ((128, 128), "JPEG")])
def test_a_preview_that_is_not_ours_is_refused_before_it_is_unpacked(tmp_path, size, kind):
    content = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", size).save(content, kind)  # 30,000 px square: 100 KB of file, 2.7 GB

    cover = json.dumps([base64.b64encode(content.getvalue()).decode()])

    refusal(rewritten(tmp_path, ssmd_cover_images=cover))


FOREIGN = {
    "LoRA. Load it with Load LoRA.": {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(2, 2)},
    "PuLID v1.1 for SDXL. Choose it as pulid_file.": {"id_adapter.id_embedding_mapping.0.weight": torch.zeros(2)},
    "PuLID v1 for SDXL. Choose it as pulid_file.": {"id_adapter.mapping_patch_0.0.weight": torch.zeros(2)},
    "tensors of something else. Choose another file.": {"cond": torch.zeros(1, 10, 2048)},
}


@pytest.mark.parametrize("found", FOREIGN)
def test_another_kind_of_safetensors_is_named(tmp_path, found):
    path = tmp_path / "anna.safetensors"
    safetensors.torch.save_file(FOREIGN[found], path, {"format": "pt"})

    assert refusal(path).endswith(f"holds {found}")


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"<!doctype html><title>404", "is a web page"),
    (b"PK\x03\x04" + bytes(100), "which is not safetensors"),
    (b"\xff" * 5 + b"\0\0\0{}", "has a header of 1099511627775 bytes"),
    ((2**20).to_bytes(8, "little") + b"{" * 100, "is cut short or altered"),
    ((10**6).to_bytes(8, "little") + b'{"a":' * 200_000, "is cut short or altered"),
    ((30).to_bytes(8, "little") + b'{"__metadata__": [1, 2, 3, 4] }', "is cut short or altered"),
], ids=["empty", "page", "zip", "huge", "long", "deep", "list"])  # fmt: skip
def test_a_file_that_is_no_safetensors_is_told_what_it_is(tmp_path, content, words):
    path = tmp_path / "anna.safetensors"
    path.write_bytes(content)

    assert words in refusal(path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "could not be read: Permission denied"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
        (OSError("Input/output error (os error 5)"), "Input/output error"),  # as safetensors raises it
    ],
)
def test_what_the_system_fails_at_is_not_told_as_a_damaged_file(tmp_path, monkeypatch, error, words):
    path = keep(tmp_path)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(identities, "safe_open", fails)

    message = refusal(path)
    assert words in message and "may be whole" in message and "encode" not in message


def many_names(size, said):
    return {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(size // 60)}


def many_covers(size, said):
    """A whole identity of zeros but for a list of pictures that takes 25 times as much memory as its text."""
    tensor = {"dtype": "F32", "shape": [1, 1, 2048], "data_offsets": [0, 8192]}
    said |= {"ssmd_cover_images": f"[{'[],' * (size // 3)}[]]"}
    said["sha256"] = identities._digest(dict.fromkeys(("cond", "uncond"), torch.zeros(1, 1, 2048)), said)
    return {"cond": tensor, "uncond": tensor | {"data_offsets": [8192, 16384]}, "__metadata__": said}


# Prints how many bytes the process grew by, at most, while it read the second file.
MEASURE = """
import sys
from contextlib import suppress
from pathlib import Path
from pulid_sdxl.models.identities import load
from pulid_sdxl.pulid.errors import IdentityFileError

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

load(Path(sys.argv[1]))
before = memory("VmRSS")
with suppress(IdentityFileError):
    sys.exit(f"loaded {load(Path(sys.argv[2]))}")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize("size", [1_900_000, 40_000_000], ids=["a header of 2 MB", "a header of 40 MB"])
@pytest.mark.parametrize("make", [many_names, many_covers])
def test_a_shared_file_takes_no_more_memory_than_its_size_and_a_little(tmp_path, make, size):
    whole, path = keep(tmp_path), tmp_path / "hostile.safetensors"
    header = json.dumps(make(size, content_of(whole)[0])).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16384 if make is many_covers else 0))
    command = [sys.executable, TOOLS, "-c", MEASURE, whole, path]

    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert grown <= path.stat().st_size + 100e6
