"""What a failure is called: both styles of error body, texts, gateways, and what to do next."""

import json
import re

import pytest
from pulid_sdxl.hosted.api import Status, read_failure


def failure(status, body=b"", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_failure(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def test_a_list_of_problems_names_the_nodes_inputs():
    found = failure(422, {"detail": [
        {"loc": ["body", "reference_images", 1, "image_url"], "msg": "no face", "type": "face_detection_error"},
        {"loc": ["body", "image_size", "width"], "msg": "too large", "type": "less_than"},
        {"loc": ["body", "prompt"], "msg": "field required", "type": "value_error.missing"},
    ]})  # fmt: skip
    assert found.kinds == {"face_detection_error", "less_than", "value_error.missing"}
    assert found.words("It failed", "abc-1") == (
        "It failed (HTTP 422). reference 2: no face; image_size.width: too large; prompt: field required. "
        "The service found no face there. Use a photograph with a clear, large face. "
        "(request abc-1)"
    )


@pytest.mark.parametrize(
    ("body", "said", "kinds"),
    [
        ({"detail": "Prompt is bad"}, "Prompt is bad", set()),
        ({"detail": "away", "error_type": "runner_disconnected"}, "away", {"runner_disconnected"}),
        ({"error": "other style"}, "other style", set()),
        ({"detail": [{"msg": "no place"}, "text"]}, "no place; text", {"unnamed"}),
        ({"detail": [{"loc": "odd", "msg": None}]}, "", set()),
        (
            {"detail": [{"loc": ["path", "request_id"], "msg": "no id", "type": "uuid"}]},
            "path.request_id: no id",
            set(),
        ),
        ({"detail": {"deep": [[["x"]]]}}, "", set()),
        *(
            (body, "", set())
            for body in (b"[" * 10**5, {"detail": [7, None, []]}, {"detail": None}, [], b"<html>", b"\xff", b"")
        ),
    ],
)
def test_every_body_is_read(body, said, kinds):
    found = failure(500, body)
    assert (found.said, found.kinds) == (said, kinds)
    assert found.words("It failed")  # whatever came, there are words for it


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (403, {"detail": "User is locked. Reason: Exhausted balance."}, {}, "billing.*after a top-up.*support"),
        (405, {}, {}, "proxy"),
        (422, {"detail": [{"msg": "x"}]}, {"x_fal_billable_units": "0"}, "Nothing was billed"),
        (422, {"detail": "x"}, {}, "may still be charged"),
        (500, {"detail": "x", "error_type": "y"}, {"x_fal_retryable": "true"}, "again may help"),
        (418, {}, {}, "dashboard/requests"),
    ],
)
def test_every_failure_says_what_to_do_next(status, body, headers, words):
    assert re.search(words, failure(status, body, **headers).words("It failed"))


def test_the_services_own_words_are_cut_when_they_are_long():
    assert len(failure(500, {"detail": "x" * 10**5}).words("It failed")) < 1000


@pytest.mark.parametrize("status", [404, 408, 422, 499, 500, 502, 503, 504])
@pytest.mark.parametrize("units", ["0", "1"])
def test_nothing_is_said_about_the_bill_without_evidence(status, units):
    found = failure(status, {"detail": "x"}, x_fal_billable_units=units, x_fal_retryable="true")
    assert not found.kinds
    assert not re.search("not billed|[Nn]othing was billed|nothing ran|again may help", found.words("It failed"))


def test_the_services_words_are_cleaned_of_control_characters():
    shown = failure(422, {"detail": "a\x1b[31mb\r\nc\u202ed"}).words("It failed")
    assert shown.isprintable() and "a [31mb  c d" in shown


def test_a_reported_error_is_read_as_a_text_or_as_the_list_in_it():
    detail = [{"loc": ["body", "prompt"], "msg": "too long", "type": "sequence_too_long"}]

    def reported(error, kind=None):
        return Status(status="COMPLETED", error=error, error_type=kind).failure

    assert reported("out of memory", "internal_error").words("It failed").startswith("It failed. out of memory. ")
    assert reported(json.dumps(detail)).said == "prompt: too long"
    assert reported(detail).kinds == {"sequence_too_long"}
    assert "out of memory" in reported("out of memory").words("It failed")
