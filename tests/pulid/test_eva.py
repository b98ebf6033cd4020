"""The vision tower against timm's, an independent implementation that shares its parameter names."""

import pytest
import torch
from pulid_sdxl.pulid import eva
from pulid_sdxl.pulid.errors import ForeignWeights

SMALL = {"img_size": 70, "embed_dim": 64, "depth": 24, "num_heads": 1, "num_classes": 24}


@pytest.fixture(scope="module")
def oracle():
    import timm  # takes a second

    torch.manual_seed(1)
    model = timm.create_model("eva02_large_patch14_clip_336", pretrained=False, **SMALL).eval()
    for parameter in model.parameters():  # timm starts norms at one and biases at zero, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def tower(oracle):
    config, state = eva.read_eva_state(oracle.state_dict())
    tower = eva.EvaVisionTower(config)
    tower.load_state_dict(state)
    return tower.requires_grad_(False)


def test_config_is_read_from_the_shapes(tower):
    assert tower.config == eva.EvaConfig(
        image_size=70, patch_size=14, width=64, depth=24, heads=1, mlp_width=170, embed_dim=24, rope_grid=16
    )


@torch.inference_mode()
def test_pooled_and_hidden_equal_timm(oracle, tower):
    pixels = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(2))
    pooled, hidden = tower(pixels)
    streams = oracle.forward_intermediates(
        pixels, indices=list(eva.HIDDEN_BLOCKS), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert torch.allclose(pooled, oracle(pixels), rtol=1e-4, atol=1e-4)
    assert len(hidden) == len(streams) == 5
    for ours, (patches, class_token) in zip(hidden, streams, strict=True):
        theirs = torch.cat((class_token, patches), dim=1)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


@torch.inference_mode()
def test_features_have_unit_length_and_batches_do_not_mix(tower):
    pixels = torch.randn(3, 3, 70, 70, generator=torch.Generator().manual_seed(3))
    together = tower.features(pixels)
    assert torch.allclose(together.pooled.norm(dim=-1), torch.ones(3))
    alone = tower.features(pixels[1:2])
    assert torch.allclose(together.pooled[1:2], alone.pooled, atol=1e-5)


def test_published_names_and_rotary_tables_are_taken_from_the_file(tower):
    published = {
        "q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "attn.norm": "attn.inner_attn_ln", "mlp.norm": "mlp.ffn_ln",
        "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3", "rope_": "rope.freqs_",
    }  # fmt: skip
    state = {"text.positional_embedding": torch.zeros(1), "logit_scale": torch.zeros(1)}
    for name, tensor in tower.state_dict().items():
        for ours, theirs in published.items():
            name = name.replace(ours, theirs)
        state[f"visual.{name}"] = tensor
    state["visual.rope.freqs_cos"] = state["visual.rope.freqs_cos"].half()
    config, own = eva.read_eva_state(state)
    assert config == tower.config
    assert own.keys() == tower.state_dict().keys()
    assert own["rope_cos"].dtype == torch.float16


def test_rotary_tables_can_be_computed_in_place_of_rounded_ones(tower):
    rounded = eva.EvaVisionTower(tower.config).half()
    rounded.compute_rotary()
    assert torch.equal(rounded.rope_cos, tower.rope_cos)
    assert torch.equal(rounded.rope_sin, tower.rope_sin)


@pytest.mark.parametrize("prefix", eva.PREFIXES)
def test_the_tower_is_found_alone_or_within_a_whole_clip(tower, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in tower.state_dict().items() if "rope" not in name}
    if prefix:
        state["text.positional_embedding"] = torch.zeros(1)
    config, own = eva.read_eva_state(state)
    assert config == tower.config
    assert own.keys() == tower.state_dict().keys()


def test_other_weights_are_named_as_foreign():
    with pytest.raises(ForeignWeights, match="not an EVA02-CLIP vision tower"):
        eva.read_eva_state({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)})


def test_a_tower_of_too_few_blocks_is_refused(tower):
    blocks = [f"blocks.{index}." for index in range(20, 24)]
    state = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith(tuple(blocks))}
    with pytest.raises(ForeignWeights, match="has 20 blocks"):
        eva.read_eva_state(state)
