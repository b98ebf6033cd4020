"""The conformance command on a folder of the same formats with other seeds, sizes and weights, made by plain code."""

import json
import subprocess
import sys

import pytest
import torch
from pulid_sdxl.pulid.attention import Fusion
from pulid_sdxl.tools import TOOLS, conformance
from pulid_sdxl.tools.published import published
from safetensors.torch import save_file

HEADS, DIM, TOKEN_WIDTH = 5, 6, 20


@pytest.fixture
def folder(tmp_path):
    """One attention site of another size, with another number of tokens and another weight."""
    torch.manual_seed(11)
    channels = HEADS * DIM
    site = {name: torch.randn(3, 9, channels) for name in "qkv"}
    site |= {"to_k": torch.randn(channels, TOKEN_WIDTH) / 4, "to_v": torch.randn(channels, TOKEN_WIDTH) / 4}
    site["tokens.14"] = torch.randn(3, 14, TOKEN_WIDTH)
    base = conformance._host_attention(site, HEADS)
    site["out.unpatched"] = base
    for mode, fusion, zero_tokens in (
        ("fidelity", Fusion.ORTHOGONAL_V2, 8), ("extreme_style", Fusion.ORTHOGONAL, 16), ("none", Fusion.PLAIN, 0)
    ):  # fmt: skip
        site[f"out.{mode}.14.scale_0.35"] = published(
            site["q"], base, site["tokens.14"], site["to_k"], site["to_v"], HEADS, fusion, zero_tokens, 0.35
        )
    site["heads"] = torch.tensor(HEADS)
    save_file({name: tensor.contiguous() for name, tensor in site.items()}, tmp_path / "attention_official.safetensors")
    (tmp_path / "seed.json").write_text(json.dumps({"seed": 123}))
    return tmp_path


def lines(folder, part="attention_official"):
    return list(conformance.lines(folder, {part: conformance.PARTS[part]}))


def test_other_sizes_hold(folder):
    assert [line.vector for line in lines(folder)][1:] == [
        "attention, extreme_style.14.scale_0.35", "attention, fidelity.14.scale_0.35", "attention, none.14.scale_0.35"
    ]  # fmt: skip
    assert all(line.holds for line in lines(folder))


def test_one_wrong_number_is_found(folder):
    path = folder / "attention_official.safetensors"
    site = conformance.load_file(path)
    site["out.fidelity.14.scale_0.35"][1, 2, 3] += 1e-3
    save_file(site, path)
    assert [line.vector for line in lines(folder) if not line.holds] == ["attention, fidelity.14.scale_0.35"]


def test_drawn_weights_follow_the_seed_and_the_name_alone():
    shapes = {"a.weight": (3, 4), "b.bias": (5,), "c.latents": (1, 2, 6)}
    one, again, other = (conformance.draw(shapes, seed) for seed in (1, 1, "1:x"))
    assert all(torch.equal(one[name], again[name]) for name in shapes)
    assert not any(torch.equal(one[name], other[name]) for name in shapes)
    assert torch.equal(conformance.draw({"b.bias": (5,)}, 1)["b.bias"], one["b.bias"])


def test_a_folder_that_lacks_files_is_refused_in_words(folder):
    run = subprocess.run(
        [sys.executable, TOOLS, "conformance", str(folder)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "lacks eva_small_vectors" in run.stderr
