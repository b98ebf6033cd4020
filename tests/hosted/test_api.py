"""The values of a request and of an answer, against the API page's own text."""

import json
from dataclasses import fields

import pytest
from pulid_sdxl.hosted import api
from pulid_sdxl.hosted.errors import BadAnswer
from pulid_sdxl.pulid.errors import InputError

from .helpers import a_job

FIELDS = [
    "reference_images", "prompt", "negative_prompt", "num_images", "guidance_scale", "num_inference_steps", "seed",
    "image_size", "id_scale", "mode", "id_mix",
]  # fmt: skip


def request(**values):
    return api.read_request(**{"reference_images": ("https://example.com/a.png",), "prompt": "a portrait"} | values)


def test_all_eleven_fields_are_there_in_the_pages_order():
    assert [field.name for field in fields(api.HostedRequest)] == FIELDS
    assert list(request(seed=0, id_mix=True).body()) == FIELDS


@pytest.mark.parametrize(
    ("size", "sent"), [((1280, 720), {"width": 1280, "height": 720}), *((name, name) for name in api.PRESETS)]
)
def test_a_preset_goes_by_its_name_and_a_size_of_ones_own_has_both_numbers(size, sent):
    assert request(image_size=size).body()["image_size"] == sent


def test_a_request_without_references_or_prompt_is_refused_in_words():
    with pytest.raises(InputError, match="at least one photograph"):
        request(reference_images=())
    with pytest.raises(InputError, match="prompt is empty"):
        request(prompt=" \n")


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"prompt": "other"}, {"id_mix": True}, {"reference_images": ("b", "a")}, {"image_size": "square"}],
)
def test_the_digest_tells_requests_apart_whoever_pays(change):
    first = request(seed=7, reference_images=("a", "b"))
    assert first.digest() == request(seed=7, reference_images=("a", "b")).digest()
    assert first.digest() != request(**{"seed": 7, "reference_images": ("a", "b")} | change).digest()


def test_a_request_keeps_its_digest_in_every_version():
    digest = "4494af872bf255149ae25ebbdfd0d10e766f91c015461d126005bb8f43116b3d"
    assert a_job().request.digest() == digest  # else what was sent by another version would be sent and paid for anew


def test_no_request_without_a_seed_equals_another():
    assert request().digest() != request().digest()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"num_images": number} for number in (0, -8, 9, 2.0, True, "3", None)),
        *({"seed": seed} for seed in (-1, 1.5, "7")),
        {"guidance_scale": float("nan")},
        {"id_scale": float("inf")},
        {"prompt": "half \ud800 a character"},
        {"negative_prompt": b"bytes"},
        {"image_size": (0, 32)},
        {"image_size": (32, 14143)},
        {"num_images": 8, "image_size": (4096, 4096)},  # more than is read of one answer
    ],
    ids=str,
)
def test_what_comes_through_a_link_and_must_not_be_sent_is_refused(wrong):
    with pytest.raises(InputError):
        request(**wrong)


def test_only_the_address_of_a_picture_is_needed_and_other_keys_are_passed_over():
    data = {"images": [{"url": "u", "width": "wide", "extra": 1}], "timings": {}, "has_nsfw_concepts": [False]}
    answer = api.read_answer(api.HostedAnswer, data)
    assert answer == api.HostedAnswer(images=(api.HostedImage(url="u"),))
    assert answer.seed == "unknown"


DEEP = json.loads("[" * 190 + "]" * 190)
ODD = {
    "url": "u", "content_type": DEEP, "file_name": 7, "file_size": float("nan"), "width": 10**4000, "height": -1e999,
}  # fmt: skip


def test_what_is_odd_beside_a_picture_is_passed_over():
    answer = api.read_answer(api.HostedAnswer, {"images": [ODD], "seed": float("nan"), "x": DEEP})
    assert (answer.images[0].url, answer.images[0].file_size, answer.seed) == ("u", None, "unknown")


@pytest.mark.parametrize("text", [b"[" * 10**6, b"1" * 5000, b'{"a": "\\ud800\\"}', b"\xff", b"", b"{"])
def test_json_that_cannot_be_read_is_none(text):
    assert api.parse(text) is None


@pytest.mark.parametrize("text", [rb'{"a": "cut \ud83d"}', r'{"a": "cut \uDCFF"}'])
def test_half_a_character_takes_nothing_else_with_it(text):
    assert api.parse(text) == {"a": "cut ?"}


def test_a_status_is_read_whatever_is_in_it():
    lines = ["a\x1b[2Jb", {"message": 7}, {"message": "c"}, DEEP, None]
    status = api.read_answer(
        api.Status, {"status": "IN_PROGRESS\n", "logs": lines, "metrics": {"t": float("nan"), "n": 1}, "error": DEEP}
    )
    assert (status.state, status.logs, status.metrics) == ("IN_PROGRESS", ("a [2Jb", "c"), {"t": None, "n": 1})
    for logs in (5, "text", {"a": 1}, True):
        assert api.read_answer(api.Status, {"status": "COMPLETED", "logs": logs}).logs == ()


@pytest.mark.parametrize(
    "data", [None, [], "x", {}, {"images": None}, {"images": []}, {"images": "x"}, {"images": DEEP}]
)
def test_an_answer_without_pictures_is_an_error(data):
    with pytest.raises(BadAnswer, match="lacks what must be in it"):
        api.read_answer(api.HostedAnswer, data)


@pytest.mark.parametrize("entry", [None, {}, {"url": None}, {"url": ""}, {"url": 7}, {"file_data": 7}])
def test_a_picture_without_an_address_is_an_error(entry):
    with pytest.raises(BadAnswer, match=r"lacks what must be in it: images\.1"):
        api.read_answer(api.HostedAnswer, {"images": [{"url": "u"}, entry], "seed": 1})
