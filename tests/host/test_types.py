"""What travels through the PULID_SDXL socket: photographs a few at a time give what they give all at once."""

import os

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import torch
from pulid_sdxl.nodes import host
from pulid_sdxl.nodes.types import Keep, Pulid, quickly
from pulid_sdxl.pulid import onednn
from pulid_sdxl.pulid.embed import embed, face_vectors, uncond_tokens
from pulid_sdxl.pulid.encoders import ENCODERS
from pulid_sdxl.pulid.eva import EvaConfig, EvaVisionTower
from pulid_sdxl.pulid.faces import to_vision_input

SMALL = EvaConfig(patch_size=168, mlp_width=8, depth=21)  # 2 x 2 patches


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    made = EvaVisionTower(SMALL)
    for parameter in made.parameters():  # norms start at one, tokens and biases at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


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
def pulid(version, tower, encoder):
    return Pulid(version, "print", (), host.managed(tower), host.managed(encoder), None, None, "here")


def photographs(count):
    """Grey faces (count, 3, 336, 336) and what the recogniser says of them."""
    generator = torch.Generator().manual_seed(2)
    faces = torch.rand(count, 1, 336, 336, generator=generator).expand(-1, 3, -1, -1)
    return faces, torch.randn(count, 512, generator=generator)


@pytest.mark.parametrize("photos", ["one person", "average", "one identity per photo"])
@pytest.mark.parametrize("id_mix", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_one_at_a_time_gives_what_all_at_once_give(pulid, tower, encoder, version, photos, id_mix, count):
    faces, arcface = photographs(count)
    features = tower.features(to_vision_input(faces))
    uncond = uncond_tokens(encoder, tower.positions)
    x = face_vectors(arcface, features)
    expected = embed(encoder, version, "print", x, features.hidden, uncond, photos, id_mix)

    keep = Keep.HIDDEN if version == "v1.1" and photos == "one person" else Keep.TOKENS
    readings = [one for row in range(count) for one in pulid.read(faces[row, None], arcface[row, None], keep)]
    made = pulid.identify(readings, photos, id_mix)

    assert made.cond.shape == expected.cond.shape and made.version == version and made.encoder == "print"
    assert torch.allclose(made.cond, expected.cond, atol=1e-5)
    assert torch.equal(made.uncond, expected.uncond)


@pytest.mark.parametrize("version", ["v1.1"], indirect=True)
@pytest.mark.parametrize("whole", [0, 1, 3])
@torch.inference_mode()
def test_hidden_states_that_were_not_kept_are_computed_again(pulid, whole):
    faces, arcface = photographs(3)
    kept = pulid.read(faces, arcface, Keep.HIDDEN)
    readings = [*kept[:whole], *pulid.read(faces, arcface, Keep.FACE)[whole:]]
    steps = []

    made = pulid.identify(readings, "one person", False, lambda: steps.append(1))

    expected = pulid.identify(kept, "one person", False)
    assert torch.allclose(made.cond, expected.cond, atol=1e-5)
    other = pulid.identify([*kept[:2], kept[0]], "one person", False)
    assert not torch.allclose(made.cond, other.cond, atol=1e-3)
    assert len(steps) == 3 * 5


@pytest.mark.parametrize("version", ["v1.1"], indirect=True)
@torch.inference_mode()
def test_a_user_can_interrupt_between_photographs(pulid):
    readings = pulid.read(*photographs(3), Keep.FACE)

    def step():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pulid.identify(readings, "one person", False, step)


@pytest.mark.parametrize(("device", "asked"), [("cpu", 1), ("cuda", 0)])
@torch.inference_mode()
def test_the_hosts_layers_make_their_products_quickly_on_the_cpu(monkeypatch, device, asked):
    products, linear = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *args: products.append(args) or linear(*args))
    layer = host.OPERATIONS.Linear(8, 8, dtype=torch.float16)
    with quickly(torch.device(device)):
        made = layer(torch.ones(1, 577, 8))
    assert made.shape == (1, 577, 8) and len(products) == asked


@pytest.mark.parametrize(
    ("keep", "floats"),
    [(Keep.TOKENS, 32 * 2048), (Keep.HIDDEN, 1280 + 5 * 5 * 1024), (Keep.FACE, 1280 + 336 * 336)],
)
@torch.inference_mode()
def test_no_more_is_kept_than_is_asked_for(pulid, keep, floats):
    for reading in pulid.read(*photographs(2), keep):
        held = sum(tensor.untyped_storage().nbytes() for tensor in reading.tensors)
        assert held <= 4 * floats
