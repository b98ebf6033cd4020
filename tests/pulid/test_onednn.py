"""pulid/onednn.py: the same products, whoever makes them."""

import pytest
import torch
from pulid_sdxl.pulid import onednn
from pulid_sdxl.pulid.onednn import FEW_ROWS, quick_linear

CPU = torch.device("cpu")
NO_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="NO ONEDNN in this torch")


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes that were convolved."""
    seen, convolve = [], torch.nn.functional.conv2d
    monkeypatch.setattr(onednn.F, "conv2d", lambda x, *rest: seen.append(tuple(x.shape)) or convolve(x, *rest))
    return seen


@NO_ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(100, 24), (1, 577, 24), (3, 80, 24), (2, 3, 40, 24)])
@torch.inference_mode()
def test_a_layer_gives_what_it_gives_without(convolutions, shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40, bias=bias), torch.randn(shape)
    expected = layer(x)
    with quick_linear(CPU):
        made = layer(x)
    assert made.shape == expected.shape and made.is_contiguous()
    assert torch.allclose(made, expected, atol=1e-5)
    assert convolutions == [(1, 24, 1, x.numel() // 24)]


@torch.inference_mode()
def test_arguments_may_have_their_names():
    """As in EVA-CLIP's own tower, which another pack's node may have loaded."""
    given = {"input": torch.randn(100, 24), "weight": torch.randn(40, 24), "bias": torch.randn(40)}
    with quick_linear(CPU):
        made = torch.nn.functional.linear(**given)
    assert torch.allclose(made, torch.nn.functional.linear(**given), atol=1e-4)


@NO_ONEDNN
@torch.inference_mode()
def test_rows_may_lie_apart_in_memory(convolutions):
    layer, x = torch.nn.Linear(24, 40), torch.randn(2, 24, 577).transpose(1, 2)
    with quick_linear(CPU):
        made = layer(x)
    assert torch.allclose(made, layer(x), atol=1e-5) and len(convolutions) == 1


@pytest.mark.parametrize(
    ("rows", "options"),
    [(FEW_ROWS - 1, {}), (577, {"dtype": torch.bfloat16}), (577, {"dtype": torch.float64}), (577, {"device": "meta"})],
)
def test_what_torch_does_as_well_is_left_to_it(convolutions, rows, options):
    layer, x = torch.nn.Linear(24, 40, **options), torch.zeros(1, rows, 24, **options)
    with quick_linear(CPU):
        assert layer(x).shape == (1, rows, 40)
    assert convolutions == []


def test_outside_of_it_nothing_changes(convolutions):
    with quick_linear(CPU):
        pass
    torch.nn.Linear(24, 40)(torch.zeros(1, 577, 24))
    assert convolutions == []
