"""models/download.py with the real huggingface_hub, against a hub on this machine that goes wrong in every way the
issue trackers know.

After each: the right file under its name, or none, and a message that says what to do.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pulid_sdxl.models import catalogue, download, locate
from pulid_sdxl.pulid.errors import DamagedWeights, DownloadError, MissingPackage
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.fakes.fake_hub import answer, cut_after, serving, slowly, stall_after
from pulid_sdxl.tools.processes import ENDS_WITH_US

CONTENT = random.Random(0).randbytes(5 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PIN = "ab" * 20
COPIES = (catalogue.Copy("maker/weights", "deep/file.safetensors", PIN),)
RECORD = replace(
    catalogue.V1_1, name="file.safetensors", copies=COPIES, size=len(CONTENT), sha256=SHA256, by_hand="https://maker/f"
)
PLACE = f"/maker/weights/resolve/{PIN}/deep/file.safetensors"
TOKEN = "hf_0123456789"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """This process's variables, without what a person may have set, and with a home of its own."""
    ours = re.compile(r"(?i)HF_.*|HUGGING.*|.*_PROXY|HOME|USERPROFILE|XDG_.*")
    kept = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    home = str(tmp_path_factory.mktemp("home"))
    return kept | {"HOME": home, "USERPROFILE": home, "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_TOKEN": TOKEN}


@pytest.fixture
def fetch(environment, tmp_path):
    def call(server, progress=lambda done, total: None, recognise=None, folder=tmp_path, more=(), **values):
        record = replace(RECORD, **values)
        return download.fetch(
            record, folder, progress, recognise, {**environment, "HF_ENDPOINT": server.url, **dict(more)}
        )

    return call


@pytest.fixture
def failure(fetch, tmp_path):
    """What a download that cannot succeed says; it leaves nothing under the final name, and says how to go on."""

    def call(server, **values):
        with pytest.raises(DownloadError) as caught:
            fetch(server, **values)
        message = str(caught.value)
        assert message.startswith("file.safetensors could not be ")
        assert not (tmp_path / "file.safetensors").exists()
        assert TOKEN not in message
        assert f"By hand: download https://maker/f and put it at {tmp_path / 'file.safetensors'}" in message
        return message

    return call


def parts(folder):
    return sorted((folder / download.STAGING).glob("*.part"))


def names(folder):
    return [entry.name for entry in folder.iterdir()]


# ---- What arrives ----


def test_a_file_arrives_whole_and_alone_from_its_commit(fetch, tmp_path):
    told = []
    with serving(CONTENT, slowly(pieces=5, seconds=0.15)) as server:
        path = fetch(server, lambda done, total: told.append((done, total)), folder=tmp_path / "models" / "pulid")

    assert path == tmp_path / "models" / "pulid" / "file.safetensors"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.safetensors"]
    assert {request.path for request in server.requests} == {PLACE}
    assert told == sorted(told) and told[-1] == (len(CONTENT), len(CONTENT))
    assert {total for _, total in told} == {len(CONTENT)}
    assert len({done for done, _ in told}) > 3


def test_a_cut_or_silent_connection_is_gone_on_from(fetch):
    with serving(CONTENT, cut_after(1 << 20), stall_after(2 << 20)) as server:
        path = fetch(server)

    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1 << 20}-", f"bytes={3 << 20}-"]
    assert server.sent == len(CONTENT)  # nothing came twice


@pytest.mark.parametrize("kept", [CONTENT, b"something else entirely", CONTENT + b"more", b"x" * len(CONTENT), b""])
def test_a_part_of_an_earlier_run_serves_where_it_is_right_and_else_does_no_harm(fetch, tmp_path, kept):
    (tmp_path / download.STAGING).mkdir()
    (tmp_path / download.STAGING / f"file.safetensors.{SHA256[:12]}.part").write_bytes(kept)
    with serving(CONTENT) as server:
        assert fetch(server).read_bytes() == CONTENT
    assert names(tmp_path) == ["file.safetensors"]
    assert bool(server.requests) is (kept != CONTENT)


def test_the_token_goes_to_the_hub_and_not_to_the_store_it_redirects_to(fetch):
    with serving(CONTENT) as store:
        there = answer(302, Location=f"{store.url}/signed?key=secret", X_Linked_Size=len(CONTENT))
        with serving(CONTENT, there, there) as server:
            assert fetch(server).read_bytes() == CONTENT

    assert {request.headers.get("authorization") for request in server.requests} == {f"Bearer {TOKEN}"}
    assert {request.headers.get("authorization") for request in store.requests} == {None}
    assert store.requests[0].path == "/signed?key=secret"


def test_a_bad_file_of_that_name_is_replaced_once_the_good_one_is_whole(fetch, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(b"bad")
    with serving(CONTENT, *[answer(404)] * 2) as server:
        with pytest.raises(DownloadError):
            fetch(server)
        assert (tmp_path / "file.safetensors").read_bytes() == b"bad"
        fetch(server)
    assert (tmp_path / "file.safetensors").read_bytes() == CONTENT


# ---- Several copies ----

TWO = (catalogue.Copy("first/one", "file.safetensors"), catalogue.Copy("second/one", "x/file.safetensors"))


def wrong(handler):
    handler.head_of_content()
    handler.body(CONTENT[:-1] + b"x")


@pytest.mark.parametrize(("first", "asked"), [(answer(404), 1), (wrong, 2)], ids=["refused", "of another hash"])
def test_the_next_copy_is_asked_where_the_first_is_no_good(fetch, first, asked):
    with serving(CONTENT, first) as server:
        assert fetch(server, copies=TWO).read_bytes() == CONTENT
    assert server.fetched == ["first/one/file.safetensors", "second/one/x/file.safetensors"][-asked:]


def test_where_a_hash_decides_main_is_asked_for_a_commit_that_is_gone(fetch):
    with serving(CONTENT, answer(404)) as server:
        fetch(server)
    assert [request.path for request in server.requests] == [PLACE, *[PLACE.replace(PIN, "main")] * 2]


def test_a_file_without_a_copy_is_to_be_had_by_hand(failure):
    with serving(CONTENT) as server:
        assert "by hand only" in failure(server, copies=())
    assert server.requests == []


# ---- What does not ----


@pytest.mark.parametrize(("content", "words"), [
    (CONTENT[:-1] + b"x", f"instead of {SHA256}"),
    (b"<!DOCTYPE html>", f"Expected {len(CONTENT)} bytes, 127.0.0.1 offers 15: another file, or a login"),
], ids=["hash", "size"])  # fmt: skip
def test_another_file_is_told_and_deleted(failure, tmp_path, content, words):
    with serving(content) as server:
        assert words in failure(server)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "words"),
    [(401, "asks for a login"), (403, "refuses"), (404, "has no such file"), (500, "is busy or broken")],
)
def test_a_refusal_is_told_with_its_number_and_the_mirrors_name(failure, code, words):
    with serving(CONTENT, *[answer(code)] * 20) as server:
        message = failure(server)
    assert f"127.0.0.1 {words}" in message and f"(HTTP {code}). Unset HF_ENDPOINT" in message


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, r"127\.0\.0\.1 cannot be reached, or broke the connection off \(Connect"),
        (
            {"HF_ENDPOINT": f"https://me:{TOKEN}@nowhere.invalid"},
            r"nowhere\.invalid cannot be found: .*HTTPS_PROXY.*HF_END",
        ),
        ({"HF_HUB_OFFLINE": "1"}, "is not asked while HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_told_with_what_may_help(failure, variables, words):
    with serving(CONTENT) as server:
        pass  # nobody listens there any more
    assert re.search(words, failure(server, more=variables))


def test_a_certificate_that_nobody_vouches_for_is_told(failure, tmp_path_factory):
    with serving(CONTENT) as server:
        server.show_a_certificate(tmp_path_factory.mktemp("tls"))
        message = failure(server, more={"HF_ENDPOINT": server.url.replace("http:", "https:")})
    assert "127.0.0.1 shows a certificate that cannot be trusted" in message and "SSL_CERT_FILE" in message


def test_a_huggingface_hub_of_another_shape_is_told(failure, tmp_path_factory):
    shape = tmp_path_factory.mktemp("shape")
    (shape / "huggingface_hub.py").write_text("constants = None")
    with serving(CONTENT) as server:
        assert "Install its newest version" in failure(server, more={"PYTHONPATH": str(shape)})


def test_a_disk_without_room_is_told_before_anything_comes(failure):
    with serving(CONTENT, lambda handler: None) as server:
        server.plan[0] = answer(200, Content_Length=10**18)
        message = failure(server, size=10**18)
    assert "It needs 1000000000000 MB more" in message and "Make room at" in message
    assert server.sent == 0


def test_a_file_in_place_of_the_folder_is_told(fetch, tmp_path):
    (tmp_path / "pulid").write_text("")
    with serving(CONTENT) as server, pytest.raises(DownloadError, match="Check the rights and the disk"):
        fetch(server, folder=tmp_path / "pulid")


def test_without_huggingface_hub_the_pip_line_is_told(fetch, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with serving(CONTENT) as server, pytest.raises(MissingPackage, match="pip install --upgrade huggingface_hub"):
        fetch(server)


def test_no_message_shows_the_home_folder(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with serving(CONTENT, *[answer(404)] * 2) as server, pytest.raises(DownloadError) as caught:
        fetch(server, folder=tmp_path / "ComfyUI" / "models" / "pulid")
    assert str(tmp_path) not in str(caught.value)
    assert os.path.join("~", "ComfyUI", "models", "pulid", "file.safetensors") in str(caught.value)
    assert locate.shown(Path("elsewhere")) == "elsewhere"


# ---- Files whose hash nobody published ----


def test_a_file_of_known_size_alone_is_checked_by_it(fetch, failure):
    with serving(CONTENT[:-1], answer(404)) as server:
        failure(server, sha256=None)  # its commit is gone, and another version would not be noticed
        assert len(server.requests) == 1
        assert f"offers {len(CONTENT) - 1}" in failure(server, sha256=None)
        server.content = CONTENT
        fetch(server, sha256=None)


@pytest.mark.parametrize("verdict", [None, "it is a picture of a cat"])
def test_a_file_without_size_and_hash_is_recognised_before_it_gets_its_name(fetch, failure, tmp_path, verdict):
    seen = []

    def recognise(path):
        seen.append((path.read_bytes() == CONTENT, (tmp_path / "file.safetensors").exists()))
        if verdict:
            raise DamagedWeights(verdict)

    with serving(CONTENT) as server:
        said = (failure if verdict else fetch)(server, recognise=recognise, size=None, sha256=None)
    assert seen == [(True, False)]
    assert not verdict or verdict in said
    assert names(tmp_path) == ([] if verdict else ["file.safetensors"])


# ---- Interruption, two at once, death ----


class Interrupted(Exception):
    pass


def test_an_interruption_ends_the_download_at_once_and_keeps_what_came(fetch, tmp_path):
    def progress(done, total):
        if done >= 1 << 20:
            raise Interrupted

    with serving(CONTENT, slowly(pieces=50, seconds=0.05)) as server:
        with pytest.raises(Interrupted):
            fetch(server, progress=progress)
        assert not (tmp_path / "file.safetensors").exists()
        [part] = parts(tmp_path)
        kept = part.stat().st_size
        assert 1 << 20 <= kept < len(CONTENT)
        assert fetch(server).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={kept}-"]


def test_waiting_for_a_silent_server_can_be_interrupted(fetch):
    told = []

    def progress(done, total):
        told.append(done)
        if len(told) == 10:
            raise Interrupted

    with serving(CONTENT, stall_after(0)) as server, pytest.raises(Interrupted):
        fetch(server, progress=progress, more={"HF_HUB_DOWNLOAD_TIMEOUT": "600"})


WRITER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from pulid_sdxl.models import catalogue, download
folder, limit, sha256, environment = sys.argv[1:]
if int(limit):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
copies = (catalogue.Copy("a/b", "c"),)
record = replace(catalogue.V1_1, name="file.safetensors", size=5 << 20, sha256=sha256, copies=copies)
print("ready", flush=True)
download.fetch(record, Path(folder), environment=json.loads(environment))
"""


@pytest.fixture
def another_process(environment, tmp_path):
    def start(server, limit=0):
        variables = json.dumps({**environment, "HF_ENDPOINT": server.url})
        command = [sys.executable, TOOLS, "-c", WRITER, tmp_path, str(limit), SHA256, variables]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **ENDS_WITH_US)

    return start


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files is how a disk is filled here")
def test_a_disk_that_fills_up_on_the_way_is_told_and_what_came_is_kept(another_process, fetch, tmp_path):
    with serving(CONTENT) as server:
        _, said = another_process(server, limit=2 << 20).communicate(timeout=60)
        assert "DownloadError" in said and "The disk is full. Make room at" in said
        assert not (tmp_path / "file.safetensors").exists()
        assert [part.stat().st_size for part in parts(tmp_path)] == [2 << 20]

        assert fetch(server).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={2 << 20}-"]


def test_two_processes_fetch_one_file_once(another_process, tmp_path):
    with serving(CONTENT, slowly(pieces=20, seconds=0.05)) as server:
        processes = [another_process(server) for _ in range(2)]
        outputs = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "file.safetensors").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.safetensors"]
    assert len(server.fetched) == 1


def test_who_waits_for_another_can_be_interrupted(fetch):
    begun, told = threading.Event(), []

    def begin(handler):
        begun.set()
        slowly(pieces=20, seconds=0.1)(handler)

    def progress(done, total):
        told.append(done)
        if len(told) == 3:
            raise Interrupted

    with serving(CONTENT, begin) as server:
        first = threading.Thread(target=fetch, args=(server,))
        first.start()
        assert begun.wait(30)
        with pytest.raises(Interrupted):
            fetch(server, progress=progress)
        first.join()
    assert len(server.fetched) == 1 and told == [0, 0, 0]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_any_point_it_leaves_the_file_or_none_and_the_next_run_completes_it(another_process, fetch, tmp_path):
    def kept():
        return sum(part.stat().st_size for part in parts(tmp_path))

    with serving(CONTENT) as server:
        for size in (0, 1 << 20, 3 << 20):
            server.plan[:] = [slowly(pieces=20, seconds=0.1)]
            process = another_process(server)
            process.stdout.readline()
            while kept() < size:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (tmp_path / "file.safetensors").exists()
        server.plan.clear()
        path = fetch(server)

    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file.safetensors"]
    assert int(server.ranges[-1][6:-1]) >= 3 << 20
