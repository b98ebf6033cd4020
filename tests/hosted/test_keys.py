"""Where the key comes from, and that it shows nowhere."""

import copy
import logging
import os
import pickle

import pytest
from pulid_sdxl.hosted import job, keys, results
from pulid_sdxl.hosted.keys import HIDDEN, Key, QuietFilter, find_key, quieten
from pulid_sdxl.pulid.errors import MissingKey

VALUE = "0d6ef3f2-aaaa-4bbb:0123456789abcdef"


def key_file(folder, text, mode=0o600):
    path = folder / "fal.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def found(environ, file):
    return find_key(environ, file).header["Authorization"]


def test_fal_key_comes_first_then_the_pair_then_the_file(tmp_path):
    file = key_file(tmp_path, 'FAL_KEY = "from:file"')
    pair = {"FAL_KEY_ID": "from", "FAL_KEY_SECRET": "pair"}

    assert found({"FAL_KEY": "from:variable", **pair}, file) == "Key from:variable"
    assert found(pair, file) == "Key from:pair"
    assert found({}, file) == "Key from:file"


@pytest.mark.parametrize("text", ["FAL_KEY=a:b", " FAL_KEY = 'a:b' \n", '# mine\nFAL_KEY = "a:b"  # really\n'])
def test_the_file_has_a_line_as_in_toml(tmp_path, text):
    assert found({}, key_file(tmp_path, text)) == "Key a:b"


def test_another_file_can_be_named(tmp_path):
    (tmp_path / "own").mkdir()
    own = key_file(tmp_path / "own", "FAL_KEY=own:file")

    assert found({"PULID_FAL_KEY_FILE": str(own)}, key_file(tmp_path, "FAL_KEY=a:b")) == "Key own:file"


@pytest.mark.parametrize("nothing", ["", "  \n", "YOUR_FAL_KEY", " YOUR_API_KEY "])
def test_a_placeholder_hides_no_key_that_comes_after_it(tmp_path, nothing):
    assert found({"FAL_KEY": nothing}, key_file(tmp_path, "FAL_KEY=a:b")) == "Key a:b"
    assert found({"FAL_KEY": "a:b"}, key_file(tmp_path, "FAL_KEY=YOUR_FAL_KEY")) == "Key a:b"


def test_white_space_around_a_key_is_no_part_of_it_and_a_colon_is_not_needed(tmp_path):
    assert found({"FAL_KEY": f" {VALUE}\n"}, tmp_path / "none") == f"Key {VALUE}"
    assert found({"FAL_KEY": "withoutcolon"}, tmp_path / "none") == "Key withoutcolon"


def test_no_key_is_said_with_the_variable_and_the_file_but_no_private_path(tmp_path):
    file = tmp_path / "someone" / "user" / "__pulid" / "fal.toml"

    with pytest.raises(MissingKey, match=r"variable FAL_KEY.*user/__pulid/fal\.toml") as caught:
        find_key({"FAL_KEY_ID": "half"}, file)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("value", ["a:b\r\nX-Evil: 1", "a:b c", "a:\x07b", "schlüssel:b"])
def test_a_key_with_control_characters_is_refused_without_being_shown(value, tmp_path):
    with pytest.raises(MissingKey, match="characters that no key has") as caught:
        find_key({"FAL_KEY": value}, tmp_path / "none")
    assert value not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_key_file_that_others_can_read_is_refused(tmp_path, mode):
    with pytest.raises(MissingKey, match="chmod 600"):
        find_key({}, key_file(tmp_path, f"FAL_KEY={VALUE}", mode))


def test_a_key_file_that_is_no_text_is_named(tmp_path):
    file = key_file(tmp_path, "")
    file.write_bytes(b"\xff\xfe")

    with pytest.raises(MissingKey, match=r"fal\.toml cannot be read"):
        find_key({}, file)


def test_a_key_shows_nowhere_but_in_its_header():
    key = Key(VALUE)

    shown = f"{key} {key!r} {[key]} {key.account} {vars(Key).keys()}"
    assert not any(part in shown for part in VALUE.split(":"))
    for write in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never written"):
            write(key)
    assert key.header == {"Authorization": f"Key {VALUE}"}


def test_accounts_differ_by_the_id_of_the_key():
    assert Key("me:one").account == Key("me:two").account != Key("you:one").account


def test_text_loses_the_key_and_its_parts():
    key_id, secret = VALUE.split(":")

    assert Key(VALUE).hide(f"[{VALUE}] [{key_id}] [{secret}]") == f"[{HIDDEN}] [{HIDDEN}] [{HIDDEN}]"
    assert Key("a:b").hide("a bad word") == "a bad word"  # short parts are no secret, and hiding them hides words


@pytest.mark.parametrize("name", [job.logger.name, results.logger.name, "aiohttp.client", "asyncio"])
def test_no_logger_writes_the_key(caplog, name):
    quieten(Key(VALUE))
    try:
        with caplog.at_level(logging.DEBUG):
            logging.getLogger(name).warning("sent %s", {"Authorization": f"Key {VALUE}"})
            logging.getLogger(name).error("Authorization: Bearer %s", "other-token-of-somebody")
            try:
                raise ValueError(VALUE)
            except ValueError:
                logging.getLogger(name).exception("failed")
    finally:
        forget()

    assert "failed" in caplog.text and "ValueError" in caplog.text
    assert not any(part in caplog.text for part in (*VALUE.split(":"), "other-token"))


def test_a_logger_keeps_one_filter_however_many_runs_there_are():
    for number in range(3):
        quieten(Key(f"key{number}:secret"))
    try:
        filters = [f for f in logging.getLogger("asyncio").filters if isinstance(f, QuietFilter)]
    finally:
        forget()
    assert len(filters) == 1


def forget():
    for name in keys.LOGGERS:
        logger = logging.getLogger(name)
        for known in [known for known in logger.filters if isinstance(known, QuietFilter)]:
            logger.removeFilter(known)
