"""pulid/encode.py: the way from photographs to an identity, without ComfyUI, against its parts taken one by one."""

import pytest
import torch
from pulid_sdxl.pulid import encode as encoding
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.encode import EncoderInput, EncodeSettings, FaceChoice, NoFace, encode, photographs
from pulid_sdxl.pulid.encoders import ENCODERS
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.pulid.faces import find_face
from pulid_sdxl.pulid.photo import read_photo
from pulid_sdxl.pulid.tokens import face_vectors, identity_of, reads_together
from pulid_sdxl.tools.conformance import FOLDER
from pulid_sdxl.tools.fakes import networks as fakes
from safetensors.torch import load_file

needs_reference = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"THE AUTHORS' NUMBERS ARE NOT CHECKED: no {FOLDER}; set PULID_REFERENCE"
)


# ---- Grey on white ----


@needs_reference
def test_vision_input_is_the_authors_to_the_precision_they_are_stored_in():
    reference = load_file(FOLDER / "face_features.safetensors")
    grey = encoding.grey_on_white(reference["crop_rgb_u8"] / 255, reference["label_map"][:, 0])
    pixels = encoding.to_vision_input(grey)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels.half(), reference["pixels_336"])


@pytest.mark.parametrize("label", range(19))
def test_what_is_not_the_face_becomes_white_and_the_rest_grey(label):
    crop = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)  # 0.299 + 0.2935 + 0.0285 = 0.621
    shown = encoding.grey_on_white(crop, torch.full((1, 1, 1), label, dtype=torch.uint8))
    expected = 1.0 if label in {0, 7, 8, 9, 14, 15, 16, 18} else 0.621
    assert shown.flatten().tolist() == pytest.approx([expected] * 3)


def test_crops_and_labels_are_left_as_they_were():
    crops, labels = torch.rand(2, 3, 512, 512), torch.zeros(2, 512, 512, dtype=torch.uint8)
    before = crops.clone()
    encoding.to_vision_input(encoding.grey_on_white(crops, labels))
    assert torch.equal(crops, before)


# ---- The whole way ----


@pytest.fixture(scope="module")
def tower():
    return fakes.small_tower()


@pytest.fixture(scope="module", params=ENCODERS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(version):
    torch.manual_seed(1)
    made = ENCODERS[version]()
    if version == "v1.1":
        torch.nn.init.normal_(made.latents)
        torch.nn.init.normal_(made.proj_out, std=0.03)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(version, encoder):
    return fakes.weights(encoder=encoder, version=version)


def images(count):
    """Photographs of different sizes, a face in each."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.rand(200 + 8 * row, 300, 3, generator=generator) * 0.9 for row in range(count)]
    for row, image in enumerate(made):
        image[100, 120 + 5 * row] = 1
    return made


def run(images, weights, networks, cache=None, step=lambda done: None, counts=(), **settings):
    chosen = EncodeSettings(weights=counts, **settings)
    return encode(photographs(images), weights, networks, chosen, cache or ResultCache(2**30), step)


@pytest.mark.parametrize("photos", ["one person", "average", "one identity per photo"])
@pytest.mark.parametrize("id_mix", [False, True])
@pytest.mark.parametrize("count", [1, 5])
@torch.inference_mode()
def test_it_gives_what_its_parts_give_all_at_once(weights, tower, encoder, version, photos, id_mix, count):
    networks = fakes.photo_networks(tower=tower)
    made = run(images(count), weights, networks, photos=photos, id_mix=id_mix).identity
    crops = [find_face(read_photo(image), fakes.SpotAnalyzer())[1] for image in images(count)]
    pixels = torch.stack([crop.pixels for crop in crops])
    grey = encoding.grey_on_white(pixels, torch.ones(count, 512, 512))
    features = tower.features(encoding.to_vision_input(grey))
    x, hidden = face_vectors(torch.stack([crop.arcface for crop in crops]), features), features.hidden
    if reads_together(version, photos):
        x, hidden = x[None], [stream.flatten(0, 1)[None] for stream in hidden]
    expected = identity_of(encoder(x, hidden), weights.zeros, version, "print", photos, id_mix)
    assert made.cond.shape == expected.cond.shape and made.version == version and made.encoder == "print"
    assert torch.allclose(made.cond, expected.cond, atol=1e-5)
    assert torch.equal(made.uncond, expected.uncond)
    assert made.preview.shape == (count, 128, 128, 3)


@pytest.mark.parametrize("version", ["v1.1"], indirect=True)
@torch.inference_mode()
def test_photographs_that_are_read_together_are_kept_as_the_encoder_takes_them(weights, tower):
    faces = run(images(2), weights, fakes.photo_networks(tower=tower)).faces
    for face in faces:
        assert isinstance(face.encoded, EncoderInput)
        assert [tuple(stream.shape) for stream in face.encoded.hidden] == [(5, 1024)] * 5  # 12 MB of 577 positions
        held = sum(tensor.untyped_storage().nbytes() for tensor in (face.encoded.x, *face.encoded.hidden))
        assert held == 4 * (1280 + 5 * 5 * 1024)  # nothing of the photographs beside it


@pytest.mark.parametrize("version", ["v1"], indirect=True)
@torch.inference_mode()
def test_of_a_photograph_that_is_read_alone_its_tokens_are_kept(weights, tower):
    [face] = run(images(1), weights, fakes.photo_networks(tower=tower)).faces
    assert face.encoded.untyped_storage().nbytes() == 4 * 10 * 2048
    assert face.grey.untyped_storage().nbytes() == 4 * 336 * 336 * 3


@torch.inference_mode()
def test_steps_count_the_photographs_and_may_stop_before_the_next():
    heard, analyzer = [], fakes.SpotAnalyzer()

    def step(done):
        heard.append(done)
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(images(5), fakes.weights(), fakes.photo_networks(analyzer), step=step)
    assert sorted({*heard}) == [0, 1, 2] and len(analyzer.lefts) == 2
    heard.clear()
    run(images(2), fakes.weights(), fakes.photo_networks(), step=lambda done: heard.append(done))
    assert sorted({*heard}) == [0, 1, 2] and heard == sorted(heard)


@torch.inference_mode()
@pytest.mark.parametrize("nth", range(1, 9))
def test_an_interrupt_is_heard_before_every_network_and_within_the_vision_tower(nth):
    heard, tower = [], fakes.small_tower()

    def step(done):
        heard.append(done)
        if len(heard) == nth:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(images(1), fakes.weights(), fakes.photo_networks(fakes.SpotAnalyzer(), tower), step=step)
    assert len(heard) == nth
    assert not any(block._forward_pre_hooks for block in tower.blocks)


@torch.inference_mode()
@pytest.mark.parametrize("photos", ["one person", "average"])
def test_every_part_of_a_network_is_preceded_by_a_look_at_whether_to_go_on(weights, tower, photos):
    """On a CPU a tower or an encoder of many photographs takes many seconds; a part of one, a fraction of a second."""
    events = []
    both = torch.nn.ModuleList([tower, weights.encoder.module])
    found = [part for part in both.modules() if isinstance(part, encoding.PARTS)]
    hooks = [part.register_forward_pre_hook(lambda *_: events.append("part")) for part in found]
    run(images(3), weights, fakes.photo_networks(tower=tower), step=lambda _: events.append("step"), photos=photos)
    for hook in hooks:
        hook.remove()
    parts = [index for index, event in enumerate(events) if event == "part"]
    assert len(parts) > len(tower.blocks) and {events[index + 1] for index in parts} == {"step"}


@torch.inference_mode()
def test_a_network_that_answers_with_nan_is_told_and_nothing_of_it_is_kept(weights, tower):
    for network in (tower.head, weights.encoder.module):
        networks, cache = fakes.photo_networks(tower=tower), ResultCache(2**30)
        hook = network.register_forward_hook(lambda *seen: seen[-1] * torch.nan)
        with pytest.raises(InputError, match="answered with NaN"):
            run(images(1), weights, networks, cache)
        hook.remove()
        assert run(images(1), weights, networks, cache).identity.cond.isfinite().all()
    networks.analyzer.recognise = lambda *_: torch.full((512,), torch.nan)
    with pytest.raises(InputError, match="recogniser answered with NaN"):
        run(images(1), weights, networks)


@torch.inference_mode()
def test_photographs_without_a_face_stop_or_are_skipped():
    taken = [torch.zeros(64, 64, 3), *images(1), torch.zeros(64, 64, 3)]
    with pytest.raises(NoFaceError) as caught:
        run(taken, fakes.weights(), fakes.photo_networks())
    assert [line[:20] for line in str(caught.value).splitlines()] == ["Photograph 1 of 3: N", "Photograph 3 of 3: N"]
    seen = run(taken, fakes.weights(), fakes.photo_networks(), skip=True).seen
    assert [isinstance(one, NoFace) for one in seen] == [True, False, True]
    with pytest.raises(NoFaceError, match=r"(?s)No photograph was left.*Photograph 1 of 1: No face"):
        run(taken[:1], fakes.weights(), fakes.photo_networks(), skip=True)


def test_what_cannot_be_used_is_named_by_its_number():
    with pytest.raises(InputError, match=r"Photograph 2 of 2: .*too small"):
        run([*images(1), torch.zeros(4, 4, 3)], fakes.weights(), fakes.photo_networks(), skip=True)
    with pytest.raises(InputError, match="empty"):
        run([], fakes.weights(), fakes.photo_networks())


@torch.inference_mode()
def test_the_cache_is_asked_before_anybody_looks_and_knows_the_circumstances():
    cache, of = ResultCache(2**30), fakes.weights(source="file")
    for analyzer in (first := fakes.SpotAnalyzer(), second := fakes.SpotAnalyzer()):
        run(images(3), of, fakes.photo_networks(analyzer), cache)
    assert (first.looks, second.looks) == (3, 0)
    for circumstances in (
        {"weights": fakes.weights(source="another file")},
        {"networks": fakes.photo_networks(fakes.SpotAnalyzer("other networks"))},
        {"networks": fakes.photo_networks(source="another tower")},
        {"choice": FaceChoice("center")},
    ):
        given = {"weights": of, "networks": fakes.photo_networks(), **circumstances}
        run(images(3), cache=cache, **given)
        assert given["networks"].analyzer.looks == 3


@torch.inference_mode()
def test_of_several_photographs_only_the_new_ones_are_looked_at_a_few_at_a_time():
    cache, of = ResultCache(2**30), fakes.weights(source="file")
    tower, analyzer = fakes.NotingTower(), fakes.SpotAnalyzer()
    networks = fakes.photo_networks(analyzer, tower)
    ten, blank = images(10), torch.zeros(64, 64, 3)
    run(ten, of, networks, cache)
    assert tower.batches == [encoding.BATCH, encoding.BATCH, 2]
    run([*images(11)[8:], blank], of, networks, cache, skip=True)
    assert tower.batches[3:] == [1] and len(analyzer.lefts) == 11
    looks = analyzer.looks
    run([blank, *ten], of, networks, cache, skip=True)  # that a photograph shows no face is kept too
    assert analyzer.looks == looks


@torch.inference_mode()
def test_each_mask_serves_its_photograph_and_the_last_one_all_that_follow():
    two = torch.full((100, 200, 3), 0.5)
    two[50, 40] = two[50, 150] = 1
    left, right = torch.zeros(2, 100, 200)
    left[40:60, 20:60], right[40:60, 130:170] = 1, 1
    for masks, lefts in (((right,), [130] * 3), ((left, right), [20, 130, 130])):
        analyzer = fakes.SpotAnalyzer()
        taken = photographs([two, two, two], masks)
        encode(taken, fakes.weights(), fakes.photo_networks(analyzer), EncodeSettings(), ResultCache(0))
        assert analyzer.lefts == lefts


# ---- Weights of photographs, and what the recogniser saw ----


@torch.inference_mode()
def test_an_average_counts_each_photograph_as_its_weight_says(weights, tower, version):
    networks, cache = fakes.photo_networks(tower=tower), ResultCache(2**30)
    alone = [run([image], weights, networks, cache, photos="average").identity for image in images(3)]
    made = run(images(3), weights, networks, cache, photos="average", counts=(1.0, 0.5, 0.5)).identity
    expected = 0.5 * alone[0].cond + 0.25 * alone[1].cond + 0.25 * alone[2].cond
    assert torch.allclose(made.cond, expected, atol=1e-5)
    equal = run(images(3), weights, networks, cache, photos="average").identity
    for count in (2.0, 1e300, 1e-300):
        same = run(images(3), weights, networks, cache, photos="average", counts=(count,) * 3).identity
        assert torch.allclose(same.cond, equal.cond, atol=1e-5) and torch.allclose(same.arcface, equal.arcface)
    directions = torch.cat([one.arcface for one in alone])
    middle = torch.nn.functional.normalize((directions * torch.tensor([[1.0], [0.5], [0.5]])).mean(0), dim=0)
    assert torch.allclose(made.arcface[0], middle, atol=1e-6)


@torch.inference_mode()
def test_a_photograph_that_is_skipped_takes_its_weight_with_it():
    taken = [images(1)[0], torch.zeros(64, 64, 3), images(2)[1]]
    alone = [run([taken[row]], fakes.weights(), fakes.photo_networks()).identity.cond for row in (0, 2)]
    made = run(taken, fakes.weights(), fakes.photo_networks(), photos="average", skip=True, counts=(3.0, 9.0, 1.0))
    assert torch.allclose(made.identity.cond, 0.75 * alone[0] + 0.25 * alone[1])


@pytest.mark.parametrize(("settings", "words"), [
    ({"photos": "one person", "counts": (1.0, 1.0)}, "Weights count in an 'average' only, .*'one person'"),
    ({"photos": "average", "counts": (0.0, 0.0)}, "not all be 0"),
    ({"photos": "average", "counts": (2.0, -1.0)}, "0 or more"),
])  # fmt: skip
@torch.inference_mode()
def test_weights_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        run(images(2), fakes.weights(), fakes.photo_networks(), **settings)


@torch.inference_mode()
def test_an_identity_keeps_how_the_recogniser_sees_each_of_its_people():
    crops = [find_face(read_photo(image), fakes.SpotAnalyzer())[1] for image in images(3)]
    directions = torch.nn.functional.normalize(torch.stack([crop.arcface for crop in crops]), dim=1)
    each = run(images(3), fakes.weights(), fakes.photo_networks(), photos="one identity per photo").identity
    together = run(images(3), fakes.weights(), fakes.photo_networks()).identity
    assert torch.allclose(each.arcface, directions, atol=1e-6)
    middle = torch.nn.functional.normalize(directions.mean(0), dim=0)
    assert torch.allclose(together.arcface, middle[None], atol=1e-6)
