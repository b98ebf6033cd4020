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


@pytest.mark.parametrize(
    "options",
    [{}, {"faces": 0}, {"faces": 8}, {"rows": 3}, {"tokens": 20}, {"version": "v1.1", "tokens": 32}],
    ids=str,
)
def test_an_identity_comes_back_to_the_bit(tmp_path, options):
    made = identity(**options)
    made.cond[0, 0, :3] = torch.tensor([-0.0, 1e-45, 3.4e38])  # values that arithmetic would change

    stored = load(save(made, tmp_path, "anna", NOON, "1.2.3"))

    for name in ("cond", "uncond"):
        assert getattr(stored.identity, name).numpy().tobytes() == getattr(made, name).numpy().tobytes()
    assert (stored.identity.version, stored.identity.encoder) == (made.version, made.encoder)
    assert (made.preview is None) == (stored.identity.preview is None)
    assert made.preview is None or torch.equal(stored.identity.preview, made.preview)


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


def test_the_day_and_the_pack_come_back(tmp_path):
    stored = load(keep(tmp_path))

    assert stored.pack == "1.2.3"
    assert stored.created == datetime(2025, 6, 1, 12, tzinfo=timezone.utc)


def test_the_version_of_the_pack_is_that_of_its_pyproject():
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert pack_version() == project["project"]["version"]


def test_a_loaded_identity_does_not_depend_on_its_file(tmp_path):
    path = keep(tmp_path)
    stored = load(path)

    path.write_bytes(bytes(path.stat().st_size))

    assert torch.equal(stored.identity.cond, identity().cond)


def test_loading_imports_no_face_models(tmp_path):
    path = keep(tmp_path)
    code = f"""
import sys
for package in ("insightface", "facexlib", "onnxruntime", "cv2", "onnx"):
    sys.modules[package] = None  # importing it fails
from pathlib import Path
from pulid_sdxl.models.identities import load
print(load(Path({str(path)!r})).identity.tokens)
"""
    run = subprocess.run([sys.executable, TOOLS, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "10\n"


def test_the_digest_of_a_file_follows_its_content_and_not_its_time(tmp_path):
    first, second = keep(tmp_path), keep(tmp_path)
    digest = identities.content_digest(first)
    other = keep(tmp_path, tokens=20)
    os.utime(second, (0, 0))

    assert load(second).identity.preview is not None
    assert identities.content_digest(other) != digest
    first.write_bytes(first.read_bytes()[:-1] + b"\0")
    assert identities.content_digest(first) != digest


# ---- Names ----


BAD_NAMES = {
    "": "it is empty",
    ".": "it is empty",
    "./": "it is empty",
    " ": "begins or ends with a space",
    "anna ": "begins or ends with a space",
    "anna.": "ends with a dot",
    "...": "ends with a dot",
    "..": "leads out",
    "../anna": "leads out",
    "a/../../anna": "leads out",
    "a\\..\\anna": "leads out",
    "/etc/passwd": "leads out",
    "\\anna": "leads out",
    "C:\\anna": "leads out",
    "C:anna": "leads out",
    "//server/share/anna": "leads out",
    "an\0na": "control characters",
    "an\nna": "control characters",
    "an\x1b[31mna": "control characters",
    "an\u202ena": "control characters",
    "an\ud800na": "control characters",
    "anna?": "holds one of",
    "ab:c/anna": "holds one of",
    "a|b": "holds one of",
    "CON": "reserved by Windows",
    "nul.safetensors": "reserved by Windows",
    "aux/anna": "reserved by Windows",
    "com¹": "reserved by Windows",
    "LPT9 .x": "reserved by Windows",
    "a" * 256: r"longer than \d+ bytes",
    "é" * 128: r"longer than \d+ bytes",
}


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_or_fits_no_file_is_refused(tmp_path, name):
    folder = tmp_path / "pulid_identities"

    for use in (lambda: find_identity(name, [folder]), lambda: keep(folder, name)):
        with pytest.raises(InputError, match=f"cannot name an identity file: .*{BAD_NAMES[name]}"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["anna", "Anna Müller", "安娜", "family/anna", "family\\anna", "console", ".a", "a.b"])
def test_a_plain_name_with_or_without_folders_serves(tmp_path, name):
    path = keep(tmp_path, name)

    assert path == tmp_path / (name.replace("\\", "/") + "_00001_.safetensors")
    assert find_identity(f"{name}_00001_.safetensors", [tmp_path]) == path


def test_the_longest_name_fits_with_its_number(tmp_path):
    path = keep(tmp_path, "a" * 200)

    assert find_identity(path.name, [tmp_path]) == path
    with pytest.raises(InputError, match="longer than 200 bytes"):
        keep(tmp_path, "a" * 201)


def test_the_first_folder_that_has_the_file_serves(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    path = keep(there)

    assert find_identity("anna_00001_.safetensors", [here, there]) == path
    assert find_identity("anna_00001_.safetensors", [there, here]) == path


def test_a_name_that_is_not_there_is_told_where_it_was_looked_for(tmp_path):
    folders = [tmp_path / "models" / "pulid_identities", tmp_path / "output" / "pulid_identities"]

    with pytest.raises(IdentityFileError) as refusal:
        find_identity("bob_00001_.safetensors", folders)

    assert "'bob_00001_.safetensors' in models/pulid_identities and output/pulid_identities" in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("what", ["file", "folder", "nothing"])
def test_a_link_is_refused_as_a_name(tmp_path, what, inside):
    folder = tmp_path / "output" / "pulid_identities"
    elsewhere = folder / "real" if inside else tmp_path / "elsewhere"
    path = keep(elsewhere)
    folder.mkdir(parents=True, exist_ok=True)
    target = {"file": path, "folder": elsewhere, "nothing": elsewhere / "gone"}[what]
    (folder / "link").symlink_to(target)
    name = "link/anna_00001_.safetensors" if what == "folder" else "link"

    with pytest.raises(InputError, match=r"'link.*' in output/pulid_identities is a link, or lies behind one"):
        find_identity(name, [folder])


def test_nothing_is_saved_behind_a_link(tmp_path):
    folder, elsewhere = tmp_path / "pulid_identities", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)

    with pytest.raises(InputError, match="is a link"):
        keep(folder, "link/new/anna")
    assert list(elsewhere.iterdir()) == []


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "pulid_identities").symlink_to(tmp_path / "drive")

    path = keep(tmp_path / "pulid_identities")

    assert find_identity(path.name, [tmp_path / "pulid_identities"]) == path


def test_a_pipe_is_no_file_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")

    with pytest.raises(IdentityFileError, match=r"There is no identity 'pipe\.safetensors'"):
        find_identity("pipe.safetensors", [tmp_path])


# ---- Saving ----


def test_saving_never_overwrites(tmp_path):
    first = keep(tmp_path)
    before = first.read_bytes()

    second = keep(tmp_path, tokens=20)

    assert [first.name, second.name] == ["anna_00001_.safetensors", "anna_00002_.safetensors"]
    assert first.read_bytes() == before


@pytest.mark.parametrize("there", ["anna_00007_.safetensors", "ANNA_00007_.SAFETENSORS", "anna_7_.safetensors"])
def test_numbers_go_on_after_the_highest(tmp_path, there):
    (tmp_path / there).touch()
    (tmp_path / "anna_b_00030_.safetensors").touch()
    (tmp_path / "anna_00031_.png").touch()

    assert keep(tmp_path).name == "anna_00008_.safetensors"


@pytest.mark.parametrize("links", [True, False], ids=["", "a file system without links"])
@pytest.mark.parametrize("there", ["file", "folder", "dangling link"])
def test_a_name_taken_meanwhile_goes_to_whoever_was_first(tmp_path, monkeypatch, there, links):
    taken = tmp_path / "anna_00001_.safetensors"
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # it comes after the highest number was looked for
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if there == "file":
        taken.write_bytes(b"theirs")
    elif there == "folder":
        taken.mkdir()
    else:
        taken.symlink_to(tmp_path / "gone")

    path = keep(tmp_path)

    assert path.name == "anna_00002_.safetensors"
    assert torch.equal(load(path).identity.cond, identity().cond)
    assert there != "file" or taken.read_bytes() == b"theirs"
    assert not (tmp_path / "gone").exists()


def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_part_that_vanishes_while_it_is_looked_at_is_no_hindrance(tmp_path):
    (tmp_path / ".a.pulid-part").symlink_to(tmp_path / "gone")  # listed, and not there

    assert keep(tmp_path).is_file()


def test_a_name_that_another_process_claims_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    claim = tmp_path / ".anna_00001_.safetensors.pulid-part"
    claim.touch()

    assert keep(tmp_path).name == "anna_00002_.safetensors"
    assert claim.exists()


def test_a_file_system_without_links_serves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)

    first, second = keep(tmp_path), keep(tmp_path)

    assert [path.name for path in sorted(tmp_path.iterdir())] == [first.name, second.name]
    assert torch.equal(load(second).identity.cond, identity().cond)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(IdentityFileError, match=r"could not be saved in .*: No space left on device"):
        keep(tmp_path / "output" / "pulid_identities")
    assert list((tmp_path / "output" / "pulid_identities").iterdir()) == []


def test_a_file_where_a_folder_should_be_is_said(tmp_path):
    (tmp_path / "family").touch()

    with pytest.raises(IdentityFileError, match="could not be saved"):
        keep(tmp_path, "family/anna")


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupt)

    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()

    assert keep(tmp_path).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"cond": torch.full((1, 10, 2048), float("nan"))}, "cond holds NaN"),
        ({"uncond": torch.zeros(1, 9, 2048)}, r"expected cond .* found .*'uncond': \(1, 9, 2048\)"),
        ({"cond": torch.zeros(1, 10, 2048).half()}, "expected cond in float32, found torch.float16"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, change, fault):
    with pytest.raises(InputError, match=f"The identity cannot be saved: {fault}"):
        save(replace(identity(), **change), tmp_path / "new", "anna", NOON, "1.2.3")
    assert not (tmp_path / "new").exists()


def test_an_identity_too_large_to_load_again_is_not_saved():
    limit = len(identities.pack_identity(identity(), NOON, "1"))

    assert identities.pack_identity(identity(), NOON, "1", limit)
    with pytest.raises(InputError, match="it has more than 0 MB"):
        identities.pack_identity(identity(), NOON, "1", limit - 1)


def test_parts_left_behind_go_after_a_day_and_nothing_else_does(tmp_path):
    old, fresh, other = (tmp_path / name for name in (".a.pulid-part", ".b.pulid-part", "c.safetensors"))
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)

    path = keep(tmp_path)

    assert set(tmp_path.iterdir()) == {fresh, other, path}


# Kills itself at every line that runs while a file is written, in a process of its own each time; then at any moment.
KILL = """
import os, signal, sys, time
from datetime import datetime, timezone
from pathlib import Path
import torch
from pulid_sdxl.models import identities
from pulid_sdxl.pulid.identity import IdEmbedding

def identity(rows):
    return IdEmbedding(torch.ones(rows, 32, 2048), torch.zeros(1, 32, 2048), "v1.1", "print")

def save(folder, rows=1):
    identities.save(identity(rows), Path(folder), "anna", datetime.now(timezone.utc), "1")

WRITING = ("save", "_write", "_give_name", "_rename")

def killed_at(line, folder):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        code = frame.f_code
        if code.co_filename != identities.__file__ or code.co_name not in WRITING:
            return None
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    save(folder)

def child(work):
    if (pid := os.fork()) == 0:
        work()
        os._exit(0)
    return pid

def no_links(*_):
    raise PermissionError(1, "Operation not permitted")

torch.set_num_threads(1)
if sys.argv[2] == "without links":
    os.link = no_links
lines, kills = 0, 0
while True:
    lines += 1
    _, status = os.waitpid(child(lambda: killed_at(lines, os.path.join(sys.argv[1], f"line{lines}"))), 0)
    if not os.WIFSIGNALED(status):
        break
for number in range(20):
    folder = os.path.join(sys.argv[1], f"moment{number}")
    os.mkdir(folder)
    pid = child(lambda: save(folder, rows=100))
    while not os.listdir(folder):
        time.sleep(0.0002)
    time.sleep(0.003 * number)
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
print(lines - 1, kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed as POSIX does it")
@pytest.mark.parametrize("file_system", ["with links", "without links"])
def test_killing_the_process_leaves_a_whole_file_or_none(tmp_path, file_system):
    command = [sys.executable, TOOLS, "-c", KILL, tmp_path, file_system]
    at_lines, at_moments = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    found = {}
    for folder in tmp_path.iterdir():
        named = list(folder.glob("*.safetensors"))
        parts = list(folder.glob(".*.pulid-part"))
        assert len(list(folder.iterdir())) == len(named) + len(parts)
        for path in named:
            assert torch.equal(load(path).identity.cond[-1], torch.ones(32, 2048))
        found[folder.name] = (len(named), len(parts))
    print(f"killed at {at_lines} lines and {at_moments} moments of writing")
    assert at_lines > 20
    assert {(0, 0), (0, 1), (1, 1), (1, 0)} <= set(found.values())  # before, while writing, between the names, after
    assert (0, 1) in {state for name, state in found.items() if name.startswith("moment")}


# Saves 25 times as soon as the other process is ready too.
SAVE_OFTEN = """
import os, sys, time
from datetime import datetime, timezone
from pathlib import Path
import torch
from pulid_sdxl.models.identities import save
from pulid_sdxl.pulid.identity import IdEmbedding

ready, folder = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3] == "without links":
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")
    os.link = no_links
(ready / sys.argv[4]).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
made = IdEmbedding(torch.ones(1, 10, 2048), torch.zeros(1, 10, 2048), "v1", "print")
for _ in range(25):
    print(save(made, folder, "anna", datetime.now(timezone.utc), "1").name)
"""


@pytest.mark.parametrize("file_system", ["with links", "without links"])
def test_processes_that_save_at_once_get_a_file_each(tmp_path, file_system):
    ready, folder = tmp_path / "ready", tmp_path / "pulid_identities"
    ready.mkdir()
    run = [sys.executable, TOOLS, "-c", SAVE_OFTEN, ready, folder, file_system]
    processes = [subprocess.Popen([*run, name], stdout=subprocess.PIPE, text=True) for name in ("first", "second")]
    names = [name for process in processes for name in process.communicate(timeout=60)[0].split()]

    assert len(set(names)) == 50
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert all(load(folder / name).identity.tokens == 10 for name in names)


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


def test_a_rewritten_file_with_nothing_changed_loads(tmp_path):
    assert load(rewritten(tmp_path)).identity.tokens == 10


@pytest.mark.parametrize("part", [0.0, 1e-5, 0.001, 0.3, 0.5, 0.99, 0.99999])
def test_a_file_cut_short_is_refused(tmp_path, part):
    path = keep(tmp_path)
    os.truncate(path, int(path.stat().st_size * part))

    assert re.search("is empty|not safetensors|is cut short or altered", refusal(path))


def test_bytes_added_at_the_end_are_refused(tmp_path):
    path = keep(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")

    assert "is cut short or altered" in refusal(path)


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path):
    path = keep(tmp_path, faces=0)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    tensors = [header, header + 1, (header + len(whole)) // 2, len(whole) - 1]

    for place in (*range(header), *tensors):
        for bit in (0, 5, 7) if place < header else range(8):
            altered = bytearray(whole)
            altered[place] ^= 1 << bit
            path.write_bytes(altered)
            refusal(path)


WRONG_CONTENT = {
    "found {'cond': (1, 10, 2048)}": lambda t: t.pop("uncond"),
    "'extra': (1,)": lambda t: t.update(extra=torch.zeros(1)),
    "'cond': (1, 10, 1024)": lambda t: t.update(cond=torch.zeros(1, 10, 1024)),
    "'cond': (10, 2048)": lambda t: t.update(cond=torch.zeros(10, 2048)),
    "'cond': (0, 10, 2048)": lambda t: t.update(cond=torch.zeros(0, 10, 2048)),
    "'cond': (1, 0, 2048)": lambda t: t.update(cond=torch.zeros(1, 0, 2048)),
    "'uncond': (1, 20, 2048)": lambda t: t.update(uncond=torch.zeros(1, 20, 2048)),
    "expected cond in float32, found torch.float16": lambda t: t.update(cond=t["cond"].half()),
    "expected uncond in float32, found torch.int32": lambda t: t.update(uncond=t["uncond"].int()),
    "cond holds NaN or infinite values": lambda t: t["cond"][0, 3].fill_(float("nan")),
    "uncond holds NaN or infinite values": lambda t: t["uncond"][0, 3].fill_(float("inf")),
}


@pytest.mark.parametrize("fault", WRONG_CONTENT)
def test_wrong_tensors_are_refused_even_with_the_right_checksum(tmp_path, fault):
    tensors = content_of(keep(tmp_path))[1]
    WRONG_CONTENT[fault](tensors)

    assert fault in refusal(rewritten(tmp_path, tensors))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format_version", "2", "has '2' for format_version; this pack reads '1', a newer pack may read it"),
        ("pulid_version", "v2", "has 'v2' for pulid_version; this pack knows v1 and v1.1"),
        ("pulid_version", None, "has '' for pulid_version"),
        ("encoder", "", "has '' for encoder; expected the fingerprint"),
        ("encoder", "e" * 10000, "for encoder; expected the fingerprint"),
        ("pack_version", "<script>", "for pack_version"),
        ("created", "yesterday", "has 'yesterday' for created; expected a time"),
        ("created", "2025-13-01T00:00:00+00:00", "is cut short or altered"),
        ("sha256", "0" * 64, "was altered after it was saved"),
        ("sha256", "", "for sha256"),
        ("ssmd_cover_images", "[]", "is cut short or altered"),
        ("ssmd_cover_images", "[1]", "is cut short or altered"),
        ("ssmd_cover_images", '["QUJD"]', "is cut short or altered"),
        ("ssmd_cover_images", "[" * 100_000, "is cut short or altered"),
    ],
)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!doctype html><title>404", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b'{"error": "not found"}', "is text (JSON)"),
        (b"PK\x03\x04" + bytes(100), "which is not safetensors"),
        (b"\xff" * 5 + b"\0\0\0{}", "has a header of 1099511627775 bytes"),
        ((2**20).to_bytes(8, "little") + b"{" * 100, "is cut short or altered"),
        ((10**6).to_bytes(8, "little") + b'{"a":' * 200_000, "is cut short or altered"),
        ((10**6).to_bytes(8, "little") + b"{" + b"9" * 10**6, "is cut short or altered"),
        ((30).to_bytes(8, "little") + b'{"__metadata__": [1, 2, 3, 4] }', "is cut short or altered"),
        ((16).to_bytes(8, "little") + b'{"cond": {"a":1}', "is cut short or altered"),
    ],
    ids=["empty", "page", "lfs", "json", "zip", "huge", "long", "deep", "digits", "list", "broken"],
)
def test_a_file_that_is_no_safetensors_is_told_what_it_is(tmp_path, content, words):
    path = tmp_path / "anna.safetensors"
    path.write_bytes(content)

    assert words in refusal(path)


def test_a_file_too_large_for_an_identity_is_not_read_to_its_end(tmp_path):
    path = keep(tmp_path)
    size = path.stat().st_size

    assert load(path, size)
    with pytest.raises(IdentityFileError, match="has more than 0 MB"):
        load(path, size - 1)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = keep(tmp_path)

    def refuse(self, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)

    assert "could not be read: Permission denied" in refusal(path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
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


# Prints how many bytes the process grew by, at most, while it read a file.
MEASURE = """
import sys
from pathlib import Path
from pulid_sdxl.models.identities import load
from pulid_sdxl.pulid.errors import IdentityFileError

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

load(Path(sys.argv[1]))
before = memory("VmRSS")
try:
    load(Path(sys.argv[2]))
except IdentityFileError:
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


# Loads damaged copies of identity files, with half a gigabyte and half a minute to do it in. Whatever loads has to be
# what was saved; all else has to be refused in words.
FUZZ = """
import random, resource, sys
from pathlib import Path
import torch
from pulid_sdxl.models.identities import load
from pulid_sdxl.pulid.errors import IdentityFileError

torch.set_num_threads(1)
path, originals = Path(sys.argv[1], "damaged.safetensors"), [Path(name) for name in sys.argv[2:]]
contents = [(original.read_bytes(), load(original).identity) for original in originals]
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
rng = random.Random(0)

def place(content):
    header = 8 + int.from_bytes(content[:8], "little")
    ranges = ((0, 8), (8, header), (8, header), (0, len(content)))
    return min(rng.randrange(*rng.choice(ranges)), len(content) - 1)

def flip(content):
    for _ in range(rng.randint(1, 4)):
        content[place(content)] = rng.randrange(256)

def number(content):
    digits = [i for i in range(8, 8 + int.from_bytes(content[:8], "little")) if chr(content[i]).isdigit()]
    content[rng.choice(digits)] = ord(rng.choice("0123456789eE.-"))

def cut(content):
    del content[place(content):]

def remove(content):
    start = place(content)
    del content[start : start + rng.randint(1, 40)]

def repeat(content):
    start = place(content)
    content[start:start] = content[start : start + rng.randint(1, 40)]

def swap(content):
    other = rng.choice(contents)[0]
    start = place(content)
    content[start : start + 200] = other[start : start + 200]

loaded, refused = 0, 0
for case in range(1500):
    original, identity = rng.choice(contents)
    content = bytearray(original)
    for damage in rng.choices((flip, number, cut, remove, repeat, swap), k=rng.choice((1, 1, 2))):
        if 8 < 8 + int.from_bytes(content[:8], "little") < len(content):
            damage(content)
    path.write_bytes(content)
    try:
        found = load(path).identity
    except IdentityFileError as error:
        assert len(str(error)) < 500 and "damaged.safetensors" in str(error), error
        refused += 1
    else:
        assert torch.equal(found.cond, identity.cond) and torch.equal(found.uncond, identity.uncond)
        assert (found.version, found.encoder) == (identity.version, identity.encoder)
        loaded += 1
print(loaded, refused)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited as Linux does it")
def test_damaged_files_are_refused_in_words_within_memory_and_time(tmp_path):
    originals = [keep(tmp_path, faces=0), keep(tmp_path, faces=2), keep(tmp_path, version="v1.1", tokens=32, faces=0)]
    run = subprocess.run([sys.executable, TOOLS, "-c", FUZZ, tmp_path, *originals], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr[-2000:]
    loaded, refused = map(int, run.stdout.split())
    print(f"{loaded + refused} damaged files: {refused} refused, {loaded} unchanged in what they say")
    assert loaded + refused == 1500
    assert refused > 1200  # the others: a flip to the same value, a swap of equal bytes
