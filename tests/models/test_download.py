"""models/download.py against a server on this machine that goes wrong in every way the issue trackers know.

After each: the right file under its name, or none, and a message that says what to do.
"""

import hashlib
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
from pulid_sdxl.pulid.errors import DamagedWeights, DownloadError
from pulid_sdxl.tools.fakes import file_server
from pulid_sdxl.tools.fakes.file_server import answer, cut_after, hang_up, serving, slowly, stall_after, without_length

CONTENT = random.Random(0).randbytes(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PROXY_VARIABLES = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Naps(list):
    """A sleep that only keeps count."""

    def __call__(self, seconds):
        self.append(seconds)


def record_of(server, **values):
    values = {"size": len(CONTENT), "sha256": SHA256} | values
    return replace(catalogue.V1_1, name="file.safetensors", address=f"{server.url}/file", revision="1", **values)


def local(**values):
    return download.Connection(loopback=True, sleep=values.pop("sleep", Naps()), **values)


def fetch(server, folder, connection=None, progress=lambda done, total: None, recognise=None, **values):
    return download.fetch(record_of(server, **values), folder, progress, recognise, connection or local())


def failure(server, folder, **values) -> str:
    """What a download that cannot succeed says; it leaves nothing under the final name, and says how to go on."""
    with pytest.raises(DownloadError) as caught:
        fetch(server, folder, **values)
    message = str(caught.value)
    assert not (folder / "file.safetensors").exists()
    assert not list(folder.glob("*.lock"))
    assert f"By hand: download {server.url}/file and put it at {folder / 'file.safetensors'}" in message
    return message


def parts(folder):
    return [path.name for path in folder.glob("*.part")]


# ---- What arrives ----


def test_a_file_arrives_whole_and_alone(tmp_path):
    with serving(CONTENT) as server:
        path = fetch(server, tmp_path / "models" / "pulid")

    assert path == tmp_path / "models" / "pulid" / "file.safetensors"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file.safetensors"]


def test_progress_grows_to_the_whole(tmp_path):
    told = []
    with serving(CONTENT) as server:
        fetch(server, tmp_path, progress=lambda done, total: told.append((done, total)))

    assert told == sorted(told)
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert {total for _, total in told} == {len(CONTENT)}


def test_a_cut_connection_is_gone_on_from(tmp_path):
    with serving(CONTENT, cut_after(1 << 20), cut_after(1 << 19)) as server:
        path = fetch(server, tmp_path)

    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1 << 20}-", f"bytes={(1 << 20) + (1 << 19)}-"]
    assert server.sent == len(CONTENT)  # nothing came twice


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(tmp_path):
    with serving(CONTENT, cut_after(1 << 20), *[hang_up] * 5) as server:
        message = failure(server, tmp_path)
        assert f"{1 << 20} bytes are kept" in message and "5 times in a row" in message
        path = fetch(server, tmp_path)

    assert path.read_bytes() == CONTENT
    assert server.sent == len(CONTENT)
    assert parts(tmp_path) == []


def test_a_part_that_is_already_whole_is_not_asked_for_again(tmp_path):
    (tmp_path / f"file.safetensors.{SHA256[:12]}.part").write_bytes(CONTENT)
    with serving(CONTENT) as server:
        assert fetch(server, tmp_path).read_bytes() == CONTENT
        assert server.requests == []


@pytest.mark.parametrize("kept", [b"something else entirely", CONTENT[:1000] + b"x" * 1000, CONTENT + b"more", b""])
def test_a_bad_part_of_an_earlier_run_does_no_harm(tmp_path, kept):
    (tmp_path / f"file.safetensors.{SHA256[:12]}.part").write_bytes(kept)
    with serving(CONTENT) as server:
        assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert parts(tmp_path) == []


def test_a_server_without_ranges_sends_all_again(tmp_path):
    with serving(CONTENT, cut_after(1 << 20), without_length()) as server:
        assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_without_a_published_hash_the_servers_version_tells_parts_apart(tmp_path):
    with serving(CONTENT, cut_after(1 << 20), *[hang_up] * 5) as server:
        failure(server, tmp_path, sha256=None)
        server.content, server.etag = CONTENT[::-1], '"second"'  # the file changed in between
        path = fetch(server, tmp_path, sha256=None)

    assert path.read_bytes() == CONTENT[::-1]


def test_without_hash_and_version_nothing_is_gone_on_from(tmp_path):
    with serving(CONTENT, cut_after(1 << 20), etag=None) as server:
        assert fetch(server, tmp_path, sha256=None).read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_a_redirect_is_followed(tmp_path):
    with serving(CONTENT) as store, serving(b"", answer(302, Location=f"{store.url}/signed?key=secret")) as server:
        assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert store.requests[0][0] == "/signed?key=secret"


def test_the_end_of_a_redirected_download_is_asked_for_at_the_address_itself(tmp_path):
    """Signed addresses run out: each try begins at the published one."""
    with serving(CONTENT, cut_after(1 << 20)) as store:
        again = answer(302, Location=f"{store.url}/signed")
        with serving(b"", again, again) as server:
            assert fetch(server, tmp_path).read_bytes() == CONTENT
            assert len(server.requests) == 2
    assert store.ranges == [None, f"bytes={1 << 20}-"]


def test_nothing_that_tells_who_asks_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(CONTENT) as server:
        fetch(server, tmp_path / "pulid")

    [(_, headers)] = server.requests
    assert set(headers) == {"Accept-Encoding", "Connection", "Host", "User-Agent"}
    assert "secret" not in str(headers)


def test_a_busy_server_is_asked_again_after_the_time_it_names(tmp_path):
    naps = Naps()
    with serving(CONTENT, answer(503, Retry_After=7), answer(429), answer(500)) as server:
        assert fetch(server, tmp_path, connection=local(sleep=naps)).read_bytes() == CONTENT
    assert sum(naps) == 7 + 4 + 8


def test_no_server_makes_us_wait_longer_than_a_minute(tmp_path):
    naps = Naps()
    with serving(CONTENT, answer(503, Retry_After=86400)) as server:
        fetch(server, tmp_path, connection=local(sleep=naps))
    assert sum(naps) == download.LONGEST_WAIT


def test_a_slow_server_is_waited_for(tmp_path):
    with serving(CONTENT, slowly(pieces=12, seconds=0.05)) as server:
        assert fetch(server, tmp_path, connection=local(seconds=2)).read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_silent_server_counts_as_cut(tmp_path):
    with serving(CONTENT, stall_after(1 << 20)) as server:
        assert fetch(server, tmp_path, connection=local(seconds=0.3)).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1 << 20}-"]


def test_a_bad_file_of_that_name_is_replaced_once_the_good_one_is_whole(tmp_path):
    (tmp_path / "file.safetensors").write_bytes(b"bad")
    with serving(CONTENT, answer(404)) as server:
        with pytest.raises(DownloadError):
            fetch(server, tmp_path)
        assert (tmp_path / "file.safetensors").read_bytes() == b"bad"
        fetch(server, tmp_path)
    assert (tmp_path / "file.safetensors").read_bytes() == CONTENT


# ---- What does not ----


def test_a_wrong_hash_is_told_and_deleted(tmp_path):
    with serving(CONTENT[:-1] + b"x") as server:
        message = failure(server, tmp_path)

    assert f"instead of {SHA256}" in message and "It was deleted" in message
    assert parts(tmp_path) == []


def test_a_wrong_size_is_refused_before_anything_comes(tmp_path):
    with serving(CONTENT[:-1]) as server:
        message = failure(server, tmp_path)

    assert f"Expected {len(CONTENT)} bytes" in message and f"offers {len(CONTENT) - 1}" in message
    assert parts(tmp_path) == []


def test_more_than_was_published_is_not_taken(tmp_path):
    with serving(CONTENT, without_length(CONTENT + b"x" * (2 << 20))) as server:
        assert "sends more than" in failure(server, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len(CONTENT)


WEB_PAGE = b"<!DOCTYPE html><title>Log in to the hotel's network</title>"


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
@pytest.mark.parametrize("size", [None, len(WEB_PAGE)])
def test_a_web_page_is_no_weight_file(tmp_path, kind, size):
    with serving(CONTENT, answer(200, WEB_PAGE, Content_Type=kind)) as server:
        message = failure(server, tmp_path, size=size, sha256=None)
    assert "web page" in message


@pytest.mark.parametrize(
    ("code", "words"), [(401, "asks for a login"), (403, "refuses"), (404, "has no such file"), (418, "HTTP 418")]
)
def test_a_refusal_is_final_and_told_with_its_number(tmp_path, code, words):
    with serving(CONTENT, answer(code)) as server:
        message = failure(server, tmp_path)
    assert words in message and f"(HTTP {code})" in message
    assert len(server.requests) == 1


@pytest.mark.parametrize("behaviour", [answer(503), hang_up, cut_after(0)], ids=["busy", "hangs up", "sends nothing"])
def test_a_server_that_stays_broken_is_given_up(tmp_path, behaviour):
    with serving(CONTENT, *[behaviour] * 20) as server:
        message = failure(server, tmp_path)
    assert "5 times in a row" in message and "Try later" in message
    assert len(server.requests) == download.TRIES


def test_a_circle_of_redirects_ends(tmp_path):
    with serving(CONTENT) as server:
        server.plan += [answer(302, Location=f"{server.url}/file")] * 50
        assert "HTTP 302" in failure(server, tmp_path)


@pytest.mark.parametrize("address", ["http://example.com/f", "ftp://example.com/f", "file:///etc/passwd"])
def test_no_redirect_leads_away_from_https(tmp_path, address):
    with serving(CONTENT, answer(302, Location=address)) as server:
        message = failure(server, tmp_path)
    assert "without https" in message or "HTTP 302" in message


def test_a_redirect_with_a_password_is_not_followed(tmp_path):
    with serving(CONTENT) as server:
        server.plan.append(answer(302, Location=server.url.replace("//", "//me:secret@")))
        message = failure(server, tmp_path)
    assert "secret" not in message


def test_plain_http_is_for_tests_only(tmp_path):
    with serving(CONTENT) as server:
        message = failure(server, tmp_path, connection=download.Connection())
    assert "Expected an https address" in message
    assert server.requests == []


def test_a_port_where_nobody_listens_is_told(tmp_path):
    with serving(CONTENT) as server:
        pass
    assert "cannot be reached" in failure(server, tmp_path)


def test_an_unknown_host_is_told_at_once_with_what_may_help(tmp_path):
    record = replace(catalogue.V1_1, address="https://nowhere.invalid/{revision}/f")
    naps = Naps()

    with pytest.raises(DownloadError, match=r"nowhere\.invalid cannot be found: .*offline.*HTTPS_PROXY.*HF_ENDPOINT"):
        download.fetch(record, tmp_path, connection=download.Connection(sleep=naps))

    assert naps == []


def test_a_disk_without_room_is_told_before_anything_comes(tmp_path):
    with serving(CONTENT, answer(200)) as server:
        server.plan[0] = lambda handler: handler.head(200, Content_Length=10**18)
        message = failure(server, tmp_path, size=10**18)
    assert "1000000000000 MB more" in message and "Make room there" in message


WRITER = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from mount import mount
mount()
from pathlib import Path
from pulid_sdxl.models import catalogue, download
from dataclasses import replace
address, folder, size, sha256, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
record = replace(catalogue.V1_1, name="file.safetensors", address=address, size=int(size), sha256=sha256)
print("ready", flush=True)
try:
    download.fetch(record, Path(folder), connection=download.Connection(loopback=True))
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def another_process(server, folder, limit=0):
    tools = Path(file_server.__file__).parent
    arguments = [tools, f"{server.url}/file", folder, len(CONTENT), SHA256, limit]
    command = [sys.executable, "-c", WRITER, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files is how a disk is filled here")
def test_a_disk_that_fills_up_on_the_way_is_told_and_what_came_is_kept(tmp_path):
    with serving(CONTENT) as server:
        out, _ = another_process(server, tmp_path, limit=1 << 20).communicate(timeout=60)
        assert "DownloadError" in out and "Make room there, then run again" in out
        assert not (tmp_path / "file.safetensors").exists()
        assert (tmp_path / parts(tmp_path)[0]).stat().st_size == 1 << 20

        assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1 << 20}-"]


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "pulid").write_text("")
    with serving(CONTENT) as server, pytest.raises(DownloadError, match="Check the rights and the disk"):
        fetch(server, tmp_path / "pulid")


# ---- Files whose hash nobody published ----


def test_a_file_of_known_size_alone_is_checked_by_it(tmp_path):
    with serving(CONTENT, without_length(CONTENT[: 1 << 20]), without_length(CONTENT)) as server:
        assert fetch(server, tmp_path, sha256=None).read_bytes() == CONTENT


def test_a_file_without_size_and_hash_is_recognised_before_it_gets_its_name(tmp_path):
    seen = []

    def recognise(path):
        seen.append((path.read_bytes() == CONTENT, (tmp_path / "file.safetensors").exists()))

    with serving(CONTENT) as server:
        fetch(server, tmp_path, recognise=recognise, size=None, sha256=None)
    assert seen == [(True, False)]


def test_what_is_not_recognised_is_deleted(tmp_path):
    def recognise(path):
        raise DamagedWeights("it is a picture of a cat")

    with serving(CONTENT) as server:
        message = failure(server, tmp_path, recognise=recognise, size=None, sha256=None)
    assert "it is a picture of a cat" in message
    assert parts(tmp_path) == []


# ---- Interruption, two at once, death ----


class Interrupted(Exception):
    pass


def test_an_interruption_ends_the_download_and_keeps_what_came(tmp_path):
    def progress(done, total):
        if done > 1 << 20:
            raise Interrupted

    with serving(CONTENT, slowly(pieces=30, seconds=0.01)) as server:
        with pytest.raises(Interrupted):
            fetch(server, tmp_path, progress=progress)
        assert not (tmp_path / "file.safetensors").exists()
        kept = (tmp_path / parts(tmp_path)[0]).stat().st_size
        assert kept > 1 << 20
        assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={kept}-"]


def test_waiting_for_a_busy_server_can_be_interrupted(tmp_path):
    told = []

    def progress(done, total):
        told.append(done)
        if len(told) == 3:
            raise Interrupted

    with serving(CONTENT, answer(503, Retry_After=60)) as server, pytest.raises(Interrupted):
        fetch(server, tmp_path, progress=progress)


def test_two_processes_fetch_one_file_once(tmp_path):
    with serving(CONTENT, slowly(pieces=20, seconds=0.05)) as server:
        processes = [another_process(server, tmp_path) for _ in range(2)]
        outputs = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "file.safetensors").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    assert len(server.requests) == 1


def test_two_threads_fetch_one_file_once(tmp_path):
    with serving(CONTENT, slowly(pieces=10, seconds=0.05)) as server:
        connection = local(sleep=lambda seconds: time.sleep(0.05))
        threads = [threading.Thread(target=fetch, args=(server, tmp_path, connection)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert (tmp_path / "file.safetensors").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_who_waits_for_another_can_be_interrupted(tmp_path):
    def progress(done, total):
        raise Interrupted

    with serving(CONTENT) as server, download._alone(tmp_path / "file.safetensors.lock", lambda: None):
        with pytest.raises(Interrupted):
            fetch(server, tmp_path, progress=progress)
        assert server.requests == []


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_any_point_it_leaves_the_file_or_none_and_the_next_run_completes_it(tmp_path):
    """Each process is killed a little later than the one before, until one is quick enough."""
    moments, delay, done = [], 0.0, False
    with serving(CONTENT) as server:
        while not done and len(moments) < 40:
            server.plan[:] = [slowly(pieces=6, seconds=0.04)]
            process = another_process(server, tmp_path)
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            target = tmp_path / "file.safetensors"
            done = target.exists()
            if done:
                assert target.read_bytes() == CONTENT
            moments.append(sum(path.stat().st_size for path in tmp_path.glob("*.part")))
            delay += 0.03
        path = fetch(server, tmp_path)

    assert path.read_bytes() == CONTENT
    assert parts(tmp_path) == [] and not list(tmp_path.glob("*.lock"))
    assert len({size for size in moments if 0 < size < len(CONTENT)}) >= 2, moments  # some died half-way


# ---- Mirrors and proxies ----


def test_a_mirror_takes_the_place_of_hugging_face_and_of_nothing_else():
    connection = download.Connection.of_environment({"HF_ENDPOINT": "https://mirror.example/hf/"})

    assert connection.address(catalogue.V1_1) == (
        "https://mirror.example/hf/guozinan/PuLID/resolve/main/pulid_v1.1.safetensors"
    )
    assert connection.address(catalogue.RETINAFACE) == catalogue.RETINAFACE.url
    assert download.Connection.of_environment({}).address(catalogue.V1_1) == catalogue.V1_1.url


def test_a_mirror_that_lacks_the_file_is_named(tmp_path):
    with serving(CONTENT, answer(404)) as server:
        connection = download.Connection(endpoint=server.url, loopback=True)
        with pytest.raises(DownloadError, match=r"127\.0\.0\.1 has no such file.*Unset HF_ENDPOINT"):
            download.fetch(catalogue.V1_1, tmp_path, connection=connection)
    assert server.requests[0][0] == "/guozinan/PuLID/resolve/main/pulid_v1.1.safetensors"


def test_a_password_in_the_mirrors_address_is_refused_and_not_repeated(tmp_path):
    connection = download.Connection(endpoint="https://me:secret@mirror.example")
    with pytest.raises(DownloadError, match=r"without a password.*mirror\.example") as caught:
        download.fetch(catalogue.V1_1, tmp_path, connection=connection)
    assert "secret" not in str(caught.value)


def test_the_usual_variables_name_a_proxy(tmp_path, monkeypatch):
    with serving(CONTENT) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        record = replace(record_of(proxy), address="http://localhost:1/file")
        download.fetch(record, tmp_path, connection=local())
    assert proxy.requests[0][0] == "http://localhost:1/file"
    assert (tmp_path / "file.safetensors").read_bytes() == CONTENT


def test_no_message_shows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with serving(CONTENT, answer(404)) as server, pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "ComfyUI" / "models" / "pulid")
    assert str(tmp_path) not in str(caught.value)
    assert os.path.join("~", "ComfyUI", "models", "pulid", "file.safetensors") in str(caught.value)
    assert locate.shown(Path("elsewhere")) == "elsewhere"


def test_the_downloader_reads_no_address_but_the_catalogues():
    """The one function that fetches takes a record; nothing turns a text from elsewhere into one."""
    room = Path(download.__file__).parents[1]
    makers = [
        path.name
        for folder in ("models", "nodes")
        for path in (room / folder).glob("*.py")
        if re.search(r"\bWeightFile\(", path.read_text(encoding="utf-8"))
    ]
    assert makers == ["catalogue.py"]
