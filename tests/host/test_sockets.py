"""What travels through the PULID_SDXL socket: photographs a few at a time give what they give all at once."""

import os

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import torch
from pulid_sdxl.nodes import host
from pulid_sdxl.nodes.sockets import Pulid
from pulid_sdxl.pulid.embed import embed, face_vectors, uncond_tokens
from pulid_sdxl.pulid.encoders import ENCODERS
from pulid_sdxl.pulid.eva import EvaConfig
from pulid_sdxl.pulid.faces import to_vision_input
from pulid_sdxl.pulid.identity import VisionFeatures

CONFIG = EvaConfig(image_size=28)  # 2 x 2 patches


class Glance(torch.nn.Module):
    """In the vision tower's place: each of its outputs is another linear map of the face's average colours."""

    config = CONFIG

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.pooled = torch.nn.Parameter(torch.randn(3, 768, generator=generator))
        self.hidden = torch.nn.Parameter(torch.randn(5, 3, 5 * 1024, generator=generator))

    def features(self, pixels):
        colours = pixels.mean(dim=(2, 3))  # (B, 3, H, W) -> (B, 3)
        hidden = (torch.unflatten(colours @ weights, 1, (5, 1024)) for weights in self.hidden)
        return VisionFeatures(torch.nn.functional.normalize(colours @ self.pooled), tuple(hidden))


@pytest.fixture(scope="module")
def tower():
    return Glance().requires_grad_(False)


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


@pytest.mark.parametrize("photos", ["one person", "average", "one identity per photo"])
@pytest.mark.parametrize("id_mix", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_one_at_a_time_gives_what_all_at_once_give(tower, encoder, version, photos, id_mix, count):
    generator = torch.Generator().manual_seed(2)
    faces, arcface = torch.rand(count, 3, 512, 512, generator=generator), torch.randn(count, 512, generator=generator)
    features = tower.features(to_vision_input(faces))
    uncond = uncond_tokens(encoder, CONFIG.grid**2 + 1)
    x = face_vectors(arcface, features)
    expected = embed(encoder, version, "print", x, features.hidden, uncond, photos, id_mix)

    pulid = Pulid(version, "print", (), host.managed(tower), host.managed(encoder), None, None, "here")
    together = version == "v1.1" and photos == "one person"
    readings = [
        reading for row in range(count) for reading in pulid.read(faces[row, None], arcface[row, None], together)
    ]
    made = pulid.identify(readings, photos, id_mix)

    assert made.cond.shape == expected.cond.shape and made.version == version and made.encoder == "print"
    assert torch.allclose(made.cond, expected.cond, atol=1e-5)
    assert torch.equal(made.uncond, expected.uncond)


@torch.inference_mode()
def test_hidden_states_are_kept_only_where_photographs_are_read_together(tower, encoder, version):
    pulid = Pulid(version, "print", (), host.managed(tower), host.managed(encoder), None, None, "here")
    faces, arcface = torch.rand(2, 3, 512, 512), torch.randn(2, 512)
    for reading in pulid.read(faces, arcface, together=False):
        assert sum(tensor.untyped_storage().nbytes() for tensor in reading.tensors) <= 32 * 2048 * 4
    for reading in pulid.read(faces, arcface, together=True):
        held = sum(tensor.untyped_storage().nbytes() for tensor in reading.tensors)
        assert held == 4 * (1280 + 5 * 5 * 1024)
