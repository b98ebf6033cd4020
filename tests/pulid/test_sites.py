"""The 70 sites in checkpoint order, against diffusers' own order of processors."""

from collections import Counter

import torch
from pulid_sdxl.pulid.sites import SITES, file_index
from pulid_sdxl.tools.diffusers_unet import sdxl_config, widths


def test_there_are_70_and_the_middle_block_is_where_comfyui_looks_it_up():
    assert len({site.key for site in SITES}) == 70
    assert Counter((site.part, site.number) for site in SITES) == {
        ("input", 4): 2, ("input", 5): 2, ("input", 7): 10, ("input", 8): 10, ("middle", 0): 10,
        ("output", 0): 10, ("output", 1): 10, ("output", 2): 10, ("output", 3): 2, ("output", 4): 2, ("output", 5): 2,
    }  # fmt: skip


def test_channels_follow_diffusers_order_of_sdxl():
    from diffusers import UNet2DConditionModel  # takes seconds

    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_config())
    assert [site.channels for site in SITES] == widths(unet)


def test_cross_attentions_hold_the_odd_numbers():
    assert [file_index(0), file_index(1), file_index(69)] == [1, 3, 139]
