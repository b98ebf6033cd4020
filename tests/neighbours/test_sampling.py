"""Beside real packs that change how a model samples: whose each row is, and that their own effect stays.

docs/composition.md has the table of what was tried, with which commits.
"""

import importlib
import os
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)
if not os.environ.get("PULID_NEIGHBOURS"):
    pytest.skip("PULID_NEIGHBOURS names no folder with other packs: nothing was tried", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import numpy as np
import torch
from pulid_sdxl.nodes import host

from ..host import sampling
from ..host.sampling import (
    MODEL_CHANNELS,
    NEGATIVE,
    POSITIVE,
    SECOND,
    SITES,
    Watcher,
    apply,
    conditioning,
    make_identity,
    sample,
)
from .packs import load, module_of, node, unloaded

pytestmark = [pytest.mark.usefixtures("inference"), pytest.mark.filterwarnings("ignore")]  # theirs


@pytest.fixture
def watch(model, monkeypatch):
    watcher = Watcher()
    handle = watcher.attach(model, monkeypatch)
    yield watcher
    handle.remove()


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(host, "say", lambda text, node_id=None: texts.append(text))
    monkeypatch.setattr(host, "executing_node", lambda: "7")
    return texts


class TestTiledDiffusion:
    @pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion"])
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("order", ["before", "after"])
    def test_tiles(self, model, pulid, watch, method, batch, order):
        tiled = node("ComfyUI-TiledDiffusion", "TiledDiffusion")()

        def tile(changed):
            return tiled.apply(changed, method, 128, 128, 64, 4)[0]

        identity, mask = make_identity(people=batch), sampling.ramp(batch, 32, 48)
        if order == "before":
            patched = apply(tile(model), pulid, identity, attn_mask=mask)
        else:
            patched = tile(apply(model, pulid, identity, attn_mask=mask))
        if method == "SpotDiffusion":
            store = module_of("ComfyUI-TiledDiffusion", "TiledDiffusion.utils").store
            store.sigmas, store.model_options, store.extra_args = torch.tensor([14.6, 0.0]), {}, {"seed": 3}
        sample(patched, noise=sampling.places(batch, 32, 48))
        assert all(tuple(call.x.shape[-2:]) == (16, 16) for call in watch.calls)
        watch.check(batch, batch, height=32)


def halves(count, height=128, width=192):
    masks = torch.zeros(count, 1, height, width)
    for number in range(count):
        masks[number, :, :, number * width // count : (number + 1) * width // count] = 1
    return masks


class TestAttentionCouples:
    @pytest.mark.parametrize("regions", [2, 3])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_ppm(self, model, pulid, watch, regions, batch):
        couple = node("ComfyUI-ppm", "AttentionCouplePPM")
        masks = halves(regions)
        given = {f"cond_{n}": conditioning(SECOND + n) for n in range(1, regions)}
        given |= {f"mask_{n}": masks[n] for n in range(1, regions)}
        patched = apply(model, pulid, make_identity(people=batch))
        coupled = couple.execute(model=patched, base_cond=conditioning(POSITIVE), base_mask=masks[0], **given)[0]
        sample(coupled, noise=sampling.places(batch))
        self.check(watch, regions, batch)

    @pytest.mark.parametrize("regions", [2, 3])
    def test_laksjdjf(self, model, pulid, watch, regions):
        load("cgem156-ComfyUI")
        couple = importlib.import_module("custom_nodes.cgem156-ComfyUI.scripts.attention_couple.node").AttentionCouple()
        masks = halves(regions)
        given = {f"cond_{n}": conditioning(SECOND + n) for n in range(1, regions)}
        given |= {f"mask_{n}": masks[n] for n in range(1, regions)}
        patched = apply(model, pulid, make_identity())
        sample(couple.attention_couple_simple(patched, masks[0], **given)[0], noise=sampling.places())
        self.check(watch, regions, 1)

    def check(self, watch, regions, batch):
        assert watch.calls
        for call in watch.calls:
            expected = []
            for prompt in call.prompts[::batch]:
                expected += list(range(batch)) * regions if prompt > 0 else [batch] * batch
            assert len(call.sites) == len(SITES)
            assert all(rows == expected for rows, _, _ in call.sites)

    def test_the_older_one_that_takes_the_sites_is_named(self, model, pulid, watch, said):
        couple = node("attention-couple-ComfyUI", "Attention couple")()
        positive = conditioning(POSITIVE, mask=halves(2)[0], mask_strength=1.0)
        positive += conditioning(SECOND, mask=halves(2)[1], mask_strength=1.0)
        for order in ("after", "before"):
            said.clear()
            first = apply(model, pulid, make_identity()) if order == "after" else model
            coupled, shown, other = couple.attention_couple(first, positive, conditioning(NEGATIVE), "Attention")
            if order == "before":
                coupled = apply(coupled, pulid, make_identity())
            sample(coupled, positive=shown, negative=other, noise=sampling.places())
            assert (order == "after") == any("60 of 70" in text for text in said)

    @pytest.mark.parametrize("regions", [2, 4])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_the_hook_of_prompt_control(self, model, pulid, watch, regions, batch):
        couple = unloaded("comfyui-prompt-control", "prompt_control.attention_couple_ppm")
        given = [
            conditioning(SECOND + n if n else POSITIVE, mask=mask, mask_strength=1.0)
            for n, mask in enumerate(halves(regions))
        ]
        positive = couple.set_cond_attnmask(given[0], [one[0] for one in given[1:]])
        sample(apply(model, pulid, make_identity(people=batch)), positive=positive, noise=sampling.places(batch))
        self.check(watch, regions, batch)

    def test_dense_diffusion_composes_below_and_is_named_above(self, model, pulid, watch, said):
        add, put = (node("ComfyUI_densediffusion", f"DenseDiffusion{name}Node")() for name in ("AddCond", "Apply"))

        def dense(changed):
            for number, mask in enumerate(halves(2)):
                (changed,) = add.append(changed, conditioning(POSITIVE + number), 1.0, mask)
            return put.apply(changed)

        below, prompt = dense(model)
        with_us = sample(apply(below, pulid, make_identity()), positive=prompt, noise=sampling.places())
        assert said == []
        watch.check()
        assert not torch.allclose(with_us, sample(below, positive=prompt, noise=sampling.places()))
        sample(dense(apply(model, pulid, make_identity()))[0], positive=prompt)
        assert len(said) == 1 and "of 70 places" in said[0]


class Pixels:
    """In a VAE's place: latents are pictures, shrunk eight times."""

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8)
        return torch.cat((small, small[:, :1]), dim=1)

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1).clamp(0, 1)


class TestPicturesInParts:
    """Packs that sample parts of a picture as pictures of their own."""

    @pytest.fixture(autouse=True)
    def no_server(self, monkeypatch):
        stub = ModuleType("server")
        stub.PromptServer = MagicMock()
        monkeypatch.setitem(sys.modules, "server", stub)

    def check(self, watch, parts, run, model, patched):
        """What `run` makes of a patched model, in so many parts."""
        without = run(model)
        watch.calls.clear()
        made = run(patched)
        assert len(watch.calls) == parts
        for call in watch.calls:
            assert sorted(set(call.prompts)) == [NEGATIVE, POSITIVE]
            assert len(call.sites) == len(SITES)
            assert all(rows == [0 if prompt > 0 else 1 for prompt in call.prompts] for rows, *_ in call.sites)
        assert not torch.allclose(made, without, atol=1e-3)
        return made

    def test_impacts_detailer_goes_from_face_to_face(self, model, pulid, watch, said):
        detailer = unloaded("ComfyUI-Impact-Pack", "impact.impact_server", packages="modules").impact_pack
        boxes = [(16, 16, 80, 80), (112, 40, 176, 104)]
        found = [
            detailer.SEG(None, np.ones((64, 64), np.float32), 0.9, box, np.array(box), "face", None) for box in boxes
        ]
        picture = torch.rand(1, 128, 192, 3, generator=torch.Generator().manual_seed(1))

        def detail(changed):
            return detailer.DetailerForEach.do_detail(
                picture, ((128, 192), found), changed, None, Pixels(), 128, True, 256, 1, 1, 3.0, "euler", "normal",
                conditioning(POSITIVE), conditioning(NEGATIVE), 0.6, 5, True, True,
            )[0]  # fmt: skip

        patched = apply(model, pulid, make_identity(), attn_mask=torch.ones(1, 128, 192))
        with_us = self.check(watch, 2, detail, model, patched)
        assert all(tuple(call.x.shape[-2:]) == (16, 16) for call in watch.calls)
        assert torch.equal(with_us[:, :, :10], picture[:, :, :10])  # which no face reaches
        assert [text for text in said if "If these are a tile of a larger picture" in text]

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_ultimate_sd_upscale_goes_from_tile_to_tile(self, model, pulid, watch, said, batch_size):
        upscaler = node("ComfyUI_UltimateSDUpscale", "UltimateSDUpscaleNoUpscale")()
        picture = torch.rand(1, 128, 256, 3, generator=torch.Generator().manual_seed(1))

        def upscale(changed):
            return upscaler.upscale(
                picture, changed, conditioning(POSITIVE), conditioning(NEGATIVE), Pixels(), 1, 1, 3.0, "euler",
                "normal", 0.6, "Linear", 128, 128, 8, 0, "None", 1.0, 8, 64, 16, True, False, batch_size,
            )[0]  # fmt: skip

        patched = apply(model, pulid, make_identity(), attn_mask=torch.ones(1, 128, 256))
        self.check(watch, 2 // batch_size, upscale, model, patched)
        assert [text for text in said if "If these are a tile of a larger picture" in text]


# Pack, module where its own registration needs a newer ComfyUI than 0.3.64, node, what it is given behind the model.
PLADIS = ("sd-perturbed-attention", "pladis_nodes", "PLADIS")
BESIDE = [
    ("sd-perturbed-attention", "nag_nodes", "NormalizedAttentionGuidance", conditioning(NEGATIVE)),
    ("prompt_injection", None, "PromptInjection", conditioning(SECOND)),
    ("pre_cfg_comfy_nodes_for_ComfyUI", None, "Excellent attention", 2.0, True),
    ("pre_cfg_comfy_nodes_for_ComfyUI", None, "Pre CFG zero attention", "cond", 1.5, 99.0, 0.0, "both", "middle", 0),
    ("ComfyUI-SEGAttention", None, "SEGAttention", 3.0, 10.0, False),
]


def put(model, pack, module, node_id, *given):
    kind = module_of(pack, module).NODE_CLASS_MAPPINGS[node_id] if module else node(pack, node_id)
    return getattr(kind(), kind.FUNCTION)(model, *given)[0]


class TestNodesThatChangeAttention:
    def test_pladis_is_named_and_composes_in_the_other_order(self, model, pulid, watch, said):
        sample(apply(put(model, *PLADIS), pulid, make_identity()), noise=sampling.places())
        assert said == []
        watch.check()
        sample(put(apply(model, pulid, make_identity()), *PLADIS))
        assert len(said) == 1 and "60 of 70" in said[0]

    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    @pytest.mark.parametrize("order", ["before", "after"])
    @pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: beside[2])
    def test_both_act(self, model, pulid, watch, said, beside, order, cfg):
        ours = apply(model, pulid, make_identity())
        both = put(ours, *beside) if order == "after" else apply(put(model, *beside), pulid, make_identity())
        made = sample(both, cfg=cfg, noise=sampling.places())
        assert said == []
        watch.check()
        for alone in (ours, put(model, *beside)):
            assert not torch.allclose(made, sample(alone, cfg=cfg, noise=sampling.places()), atol=1e-3)


class TestNag:
    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    def test_it_is_inactive_and_says_so(self, model, pulid, watch, said, cfg):
        sampler = module_of("ComfyUI-NAG", "ComfyUI_NAG.samplers")

        def run(patched):
            guider = sampler.NAGCFGGuider(patched)
            guider.set_conds(conditioning(POSITIVE), conditioning(NEGATIVE))
            guider.set_cfg(cfg)
            guider.set_batch_size(1)
            guider.set_nag(conditioning(-3.0), 5.0, 2.5, 0.25, 0.0)
            return sample(patched, guider=guider, noise=sampling.places())

        patched = apply(model, pulid, make_identity())
        guided = run(patched)
        assert [text for text in said if "NAG is inactive" in text]
        assert all(rows == call.expected_rows() for call in watch.calls for rows, _, _ in call.sites)
        assert torch.allclose(guided, sample(patched, cfg=cfg, noise=sampling.places()), atol=1e-4)
        assert not torch.allclose(run(model), sample(model, cfg=cfg, noise=sampling.places()), atol=1e-4)


class TestAnimateDiffEvolved:
    def test_context_windows_without_a_motion_model(self, model, pulid, watch):
        pack = "ComfyUI-AnimateDiff-Evolved"
        [context] = node(pack, "ADE_StandardStaticContextOptions")().create_options(3, 1)
        patched = apply(model, pulid, make_identity(people=5), attn_mask=sampling.ramp(5))
        [evolved] = node(pack, "ADE_UseEvolvedSampling")().use_evolved_sampling(patched, "autoselect", None, context)
        sample(evolved, noise=sampling.places(5))
        assert len(watch.calls) > 1
        watch.check(5, 5)


class TestIPAdapterPlus:
    @pytest.mark.parametrize("weight_type", ["linear", "style transfer", "composition", "ease in", "strong middle"])
    @pytest.mark.parametrize("order", ["before", "after"])
    @pytest.mark.parametrize("weight", [0.8, 0.0])
    def test_weight_types(self, model, pulid, watch, weight_type, order, weight):
        plus = module_of("ComfyUI_IPAdapter_plus", "IPAdapter_plus.IPAdapterPlus")

        class Layers(torch.nn.Module):
            """The keys and values of an IPAdapter, of an image that is all in the cond."""

            def __init__(self):
                super().__init__()
                torch.manual_seed(3)
                self.to_kvs = torch.nn.ModuleDict(
                    {
                        f"{2 * number + 1}_to_{part}_ip": torch.nn.Linear(2048, site.channels * MODEL_CHANNELS // 320)
                        for number, site in enumerate(SITES)
                        for part in "kv"
                    }
                )

        class Adapter:
            ip_layers = Layers()

            def get_multigpu_clone(self, device):
                return self

        weights = {3: weight} if weight_type == "composition" else {6: weight} if "style" in weight_type else weight

        def put(patched):
            changed = patched.clone()
            kwargs = {
                "ipadapter": Adapter(), "weight": weights, "cond": torch.ones(1, 4, 2048),
                "cond_alt": None, "uncond": torch.zeros(1, 4, 2048), "weight_type": weight_type, "mask": None,
                "sigma_start": 1e9, "sigma_end": 0.0, "unfold_batch": False, "embeds_scaling": "V only",
            }  # fmt: skip
            for number, site in enumerate(SITES):
                plus.set_model_patch_replace(changed, {**kwargs, "module_key": str(2 * number + 1)}, site.key)
            return changed

        ours = apply(model, pulid, make_identity())
        both = apply(put(model), pulid, make_identity()) if order == "before" else put(ours)
        with_both = sample(both, noise=sampling.places())
        watch.check()
        assert torch.equal(with_both, sample(ours, noise=sampling.places())) == (weight == 0)
