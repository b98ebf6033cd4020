"""The values of a request and of an answer, against the API page's own text."""

import json
from dataclasses import fields

import pytest
from pulid_sdxl.hosted import api
from pulid_sdxl.hosted.errors import BadAnswer
from pulid_sdxl.pulid.errors import InputError

# The page's example, as it prints it; the negative prompt with the two spaces that the service's own text has.
PAGE = json.loads("""
{
  "reference_images": [
    {"image_url": "https://storage.googleapis.com/falserverless/pulid/img2.png"},
    {"image_url": "https://storage.googleapis.com/falserverless/pulid/img1.png"}
  ],
  "prompt": "portrait, impressionist painting, loose brushwork, vibrant color, light and shadow play",
  "negative_prompt": "flaws in the eyes, flaws in the face, flaws, lowres, non-HDRi, low quality, worst quality,artifacts noise, text, watermark, glitch, deformed, mutated, ugly, disfigured, hands, low resolution, partially rendered objects,  deformed or partially rendered eyes, deformed, deformed eyeballs, cross-eyed,blurry",
  "num_images": 1,
  "guidance_scale": 1.2,
  "num_inference_steps": 4,
  "image_size": {"height": 1024, "width": 768},
  "id_scale": 0.8,
  "mode": "fidelity"
}
""")  # noqa: E501
FIELDS = [
    "reference_images", "prompt", "negative_prompt", "num_images", "guidance_scale", "num_inference_steps", "seed",
    "image_size", "id_scale", "mode", "id_mix",
]  # fmt: skip
SAMPLE = {
    "images": [
        {
            "url": "https://v3.fal.media/files/a/z9RV14K95DvU.png",
            "content_type": "image/png",
            "file_name": "z9RV14K95DvU.png",
            "file_size": 4404019,
            "width": 1024,
            "height": 1024,
        }
    ],
    "seed": 42,
}


def request(**values):
    return api.HostedRequest(**{"reference_images": ("https://example.com/a.png",), "prompt": "a portrait"} | values)


def test_the_defaults_are_the_pages_example():
    urls = tuple(entry["image_url"] for entry in PAGE["reference_images"])

    body = api.HostedRequest(urls, PAGE["prompt"]).body()

    assert json.dumps(body) == json.dumps(PAGE)  # the order too


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
def test_the_digest_tells_requests_and_accounts_apart(change):
    first = request(seed=7, reference_images=("a", "b"))

    assert first.digest("me") == request(seed=7, reference_images=("a", "b")).digest("me")
    assert first.digest("me") != first.digest("you")
    assert first.digest("me") != request(**{"seed": 7, "reference_images": ("a", "b")} | change).digest("me")


def test_the_pages_answer_is_read_whole():
    answer = api.read_answer(api.HostedAnswer, SAMPLE)

    [image] = answer.images
    assert {name: getattr(image, name) for name in SAMPLE["images"][0]} == SAMPLE["images"][0]
    assert image.file_data is None
    assert answer.seed == "42"


def test_a_seed_beyond_64_bits_keeps_every_digit():
    assert api.read_answer(api.HostedAnswer, {**SAMPLE, "seed": 17454220438242315174}).seed == "17454220438242315174"


def test_only_the_address_of_a_picture_is_needed_and_other_keys_are_passed_over():
    data = {"images": [{"url": "u", "width": "wide", "extra": 1}], "timings": {}, "has_nsfw_concepts": [False]}

    answer = api.read_answer(api.HostedAnswer, data)

    assert answer == api.HostedAnswer(images=(api.HostedImage(url="u"),))
    assert answer.seed == "unknown"


@pytest.mark.parametrize("data", [None, [], "x", {}, {"images": None}, {"images": []}, {"images": "x"}])
def test_an_answer_without_pictures_is_an_error(data):
    with pytest.raises(BadAnswer, match="lacks what must be in it"):
        api.read_answer(api.HostedAnswer, data)


@pytest.mark.parametrize("entry", [None, {}, {"url": None}, {"url": ""}])
def test_a_picture_without_an_address_is_an_error(entry):
    with pytest.raises(BadAnswer, match=r"lacks what must be in it: images\.1"):
        api.read_answer(api.HostedAnswer, {"images": [{"url": "u"}, entry], "seed": 1})
