"""What a failure is called: both styles of error body, texts, gateways, and what to do next."""

import json
import re

import pytest
from pulid_sdxl.hosted.errors import Problem, read_failure, reported_failure


def failure(status, body=b"", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_failure(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def test_a_list_of_problems_names_the_nodes_inputs():
    found = failure(422, {"detail": [
        {"loc": ["body", "reference_images", 1, "image_url"], "msg": "no face", "type": "face_detection_error"},
        {"loc": ["body", "image_size", "width"], "msg": "too large", "type": "less_than"},
        {"loc": ["body", "prompt"], "msg": "field required", "type": "value_error.missing"},
    ]})  # fmt: skip

    assert [problem.where for problem in found.problems] == ["reference 2", "image_size.width", "prompt"]
    assert found.kinds == {"face_detection_error", "less_than", "value_error.missing"}
    assert found.words("It failed", "abc-1") == (
        "It failed (HTTP 422). reference 2: no face; image_size.width: too large; prompt: field required. "
        "The service found no face there. Use a photograph with a clear, large face. "
        "(request abc-1)"
    )


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        ({"detail": "Prompt is bad"}, (Problem("", "Prompt is bad"),)),
        ({"detail": "away", "error_type": "runner_disconnected"}, (Problem("", "away", "runner_disconnected"),)),
        ({"error": "other style"}, (Problem("", "other style"),)),
        ({"detail": [{"msg": "no place"}, "text"]}, (Problem("", "no place"), Problem("", "text"))),
        ({"detail": [{"loc": "odd", "msg": None}]}, (Problem("", ""),)),
        ({"detail": None}, ()),
        ([], ()),
        (b"<html>nginx</html>", ()),
        (b"\xff\xfe", ()),
        (b"", ()),
    ],
)
def test_every_body_is_read(body, problems):
    found = failure(500, body)
    assert found.problems == problems
    assert found.words("It failed")  # whatever came, there are words for it


def test_the_kind_may_come_in_a_header():
    assert failure(504, {"detail": "x"}, x_fal_error_type="startup_timeout").kinds == {"startup_timeout"}
    assert failure(504, b"", x_fal_error_type="startup_timeout").kinds == {"startup_timeout"}


def test_no_kind_is_none_at_all():
    assert failure(503, {"detail": "x"}).kinds == set()


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (401, {"detail": "no"}, {}, "FAL_KEY or the key file"),
        (403, {"detail": "User is locked. Reason: Exhausted balance."}, {}, "billing.*after a top-up.*support"),
        (403, {"detail": "Forbidden"}, {}, "scope API"),
        (404, {"detail": "Not found"}, {}, "expired"),
        (405, {}, {}, "proxy"),
        (413, {}, {}, "transport to upload"),
        (429, {}, {}, "busy"),
        (500, {"detail": "Oops"}, {}, "Oops.*not billed"),
        (504, {"detail": "x"}, {"x_fal_request_timeout_type": "user"}, "nothing ran"),
        (422, {"detail": "x"}, {"x_fal_billable_units": "0"}, "Nothing was billed"),
        (422, {"detail": "x"}, {}, "may still be charged"),
        (500, {"detail": "x"}, {"x_fal_retryable": "true"}, "again may help"),
        (422, {"detail": [{"msg": "m", "type": "content_policy_violation"}]}, {}, "content check"),
        (422, {"detail": [{"msg": "m", "type": "file_download_error"}]}, {}, "some hosts block"),
        (418, {}, {}, "dashboard/requests"),
    ],
)
def test_every_failure_says_what_to_do_next(status, body, headers, words):
    assert re.search(words, failure(status, body, **headers).words("It failed"))


def test_the_services_own_words_are_cut_when_they_are_long():
    assert len(failure(500, {"detail": "x" * 10**5}).words("It failed")) < 1000


def test_a_reported_error_is_read_as_a_text_or_as_the_list_in_it():
    detail = [{"loc": ["body", "prompt"], "msg": "too long", "type": "sequence_too_long"}]

    assert (
        reported_failure("out of memory", "internal_error").words("It failed").startswith("It failed. out of memory. ")
    )
    assert reported_failure(json.dumps(detail), None).problems == (Problem("prompt", "too long", "sequence_too_long"),)
    assert reported_failure(detail, None).kinds == {"sequence_too_long"}
