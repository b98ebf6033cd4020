"""The patch on a real ComfyUI: what it leaves alone, what it composes with, and which tokens each pass gets."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import Guider_PerpNeg, PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from pulid_sdxl.nodes import host, patch, rows
from pulid_sdxl.nodes.apply import PulidApplyAdvanced
from pulid_sdxl.pulid.attention import IdProjections, fuse
from pulid_sdxl.pulid.encoders import IdEncoder
from pulid_sdxl.pulid.errors import InputError, MismatchError
from pulid_sdxl.pulid.sites import SITES
from pulid_sdxl.pulid.tokens import identity_of, join_tokens
from pulid_sdxl.tools.fakes import networks as fakes

from .sampling import (
    EMPTY,
    MODEL_CHANNELS,
    NEGATIVE,
    POSITIVE,
    SECOND,
    WIDTHS,
    add_callback,
    apply,
    conditioning,
    fuse_by,
    make_identity,
    projections,
    sample,
    sites_of,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def noisy():
    """A loaded PuLID with an encoder, for what the negative branch sees."""
    torch.manual_seed(2)
    return fakes.loaded(fakes.weights(projections(), IdEncoder()))


def middle(patched):
    return sites_of(patched)[("middle", 0, 0)]


def residuals(patched, key=("input", 4, 0)):
    """How many of our patches lie on a site."""
    count, on = 0, sites_of(patched)[key]
    while isinstance(on, patch.AttentionPatch):
        count, on = count + 1, on.base
    return count


class TestLeavesNothingBehind:
    def test_runs_are_bit_identical_and_so_is_the_model_without_the_node_before_and_after(self, model, pulid, identity):
        before = sample(model, steps=2)
        patched = apply(model, pulid, identity)
        with_pulid = sample(patched, steps=2)
        assert not torch.allclose(with_pulid, before, atol=1e-3)
        assert torch.equal(sample(patched, steps=2), with_pulid)
        assert torch.equal(sample(model, steps=2), before)
        assert "patches_replace" not in model.model_options["transformer_options"]

    def test_zero_weight_installs_nothing(self, model, pulid, identity):
        assert apply(model, pulid, identity, weight=0.0) is model

    def test_bfloat16_and_float16_lose_at_most_twice_what_the_model_loses(self, pulid, identity):
        exact = comfy_host.sdxl(MODEL_CHANNELS)
        references = [sample(exact), sample(apply(exact, pulid, identity))]
        for dtype in (torch.bfloat16, torch.float16):
            rounded = comfy_host.sdxl(MODEL_CHANNELS, dtype)
            errors = [
                (sample(other) - reference).abs().max()
                for other, reference in zip((rounded, apply(rounded, pulid, identity)), references, strict=True)
            ]
            assert 0 < errors[1] <= 2 * errors[0]

    def test_fp8_storage_computes_in_the_models_own_dtype(self, pulid, identity):
        stored = comfy_host.sdxl(MODEL_CHANNELS, torch.float8_e4m3fn)
        patched = apply(stored, pulid, identity)
        assert middle(patched).kv.keys.dtype == torch.float32
        assert sample(patched).isfinite().all()
        assert not torch.equal(sample(patched), sample(stored))


def test_all_70_sites_fire_the_middle_ones_included(model, pulid, identity):
    fired = set()
    patched = apply(model, pulid, identity)
    for key, on in list(sites_of(patched).items()):

        def through(q, k, v, extra_options, key=key, on=on):
            fired.add(key)
            assert (*extra_options["block"], extra_options["block_index"]) == key
            return on(q, k, v, extra_options)

        sites_of(patched)[key] = through
    sample(patched)
    assert fired == {site.key for site in SITES}


PASS = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(2)}  # what the host adds to the options of every pass


def one_pass(patched):
    """The UNet alone, on two rows, without the host's moving of weights."""
    generator = torch.Generator().manual_seed(9)
    shapes = {"x": (2, 4, 16, 24), "context": (2, 77, 2048), "y": (2, 2816)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    options = {**patched.model_options["transformer_options"], **PASS}
    return patched.model.diffusion_model(**inputs, timesteps=torch.full((2,), 500.0), transformer_options=options)


class TestMemory:
    def test_weights_that_stay_off_the_device_give_the_same_picture(self, model, pulid, identity):
        lowvram = comfy_host.sdxl(MODEL_CHANNELS)
        lowvram.load(torch.device("cpu"), lowvram_model_memory=1)  # as --lowvram and --novram leave nearly all of them
        offloaded, cpu = projections(), torch.device("cpu")
        comfy.model_patcher.ModelPatcher(offloaded, cpu, cpu).load(cpu, lowvram_model_memory=1)
        resting = fakes.loaded(fakes.weights(offloaded))
        assert any(getattr(module, "comfy_cast_weights", False) for module in lowvram.model.modules())
        expected = one_pass(apply(model, pulid, identity))
        assert torch.equal(one_pass(apply(lowvram, resting, identity)), expected)

    def test_networks_are_held_by_the_patcher_that_the_host_chose_at_start(self, monkeypatch):
        class Chosen(comfy.model_patcher.ModelPatcher):
            pass

        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Chosen, raising=False)
        managed = host.managed(torch.nn.Linear(1, 1))
        managed.load()
        held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
        assert [type(patcher) for patcher in held if patcher.model is managed.module] == [Chosen]

    def test_keys_and_values_follow_the_queries_to_their_device_and_dtype(self, model, pulid, identity):
        site = middle(apply(model, pulid, identity))
        q, k, v = torch.empty(3, 2, 24, WIDTHS[-1], device="meta", dtype=torch.bfloat16)
        site.base = lambda q, k, v, extra_options: q
        out = site(q, k, v, {"n_heads": WIDTHS[-1] // 64, **PASS})
        assert (out.device.type, out.dtype) == ("meta", torch.bfloat16)

    def test_the_host_moves_a_patch_by_device_and_never_to_a_storage_dtype_and_what_lies_below(
        self, model, pulid, identity
    ):
        asked = []
        site = middle(apply(model, pulid, identity))
        site.base = SimpleNamespace(to=lambda target: asked.append(target) or site.base)
        moved = site.to(torch.device("meta")).to(torch.float8_e4m3fn)
        assert (moved.kv.keys.device.type, moved.kv.keys.dtype) == ("meta", torch.float32)
        assert site.kv.keys.device.type == "cpu"
        assert asked == [torch.device("meta"), torch.float8_e4m3fn]


class TestSchedule:
    def test_outside_its_range_the_node_changes_nothing(self, model, pulid, identity):
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        assert sigmas[0] > model.get_model_object("model_sampling").percent_to_sigma(0.9)
        late = apply(model, pulid, identity, start_at=0.9, end_at=0.95)
        assert torch.equal(sample(late, steps=1), sample(model, steps=1))

    def test_two_ranges_by_chaining_equal_one_over_both(self, model, pulid, identity):
        first = apply(model, pulid, identity, start_at=0.0, end_at=0.4)
        both = apply(first, pulid, identity, start_at=0.4001, end_at=1.0)
        assert torch.allclose(sample(both, steps=3), sample(apply(model, pulid, identity), steps=3), atol=1e-4)

    def test_nothing_waits_for_the_device_inside_a_step(self, model, pulid, identity, monkeypatch):
        patched = apply(model, pulid, identity, start_at=0.1, end_at=0.9, attn_mask=torch.rand(2, 64, 64))
        sample(patched, steps=2)  # grids are made in the first step

        def waits(self, *args, **kwargs):
            raise AssertionError("a step read a value from the device")

        calls = []
        for key, replacement in list(sites_of(patched).items()):

            def guarded(*args, replacement=replacement):
                with monkeypatch.context() as step:
                    for name in ("item", "cpu", "tolist", "__bool__", "__float__", "__int__", "numpy", "nonzero"):
                        step.setattr(torch.Tensor, name, waits)
                    calls.append(1)
                    return replacement(*args)

            sites_of(patched)[key] = guarded
        sample(patched, steps=1)
        assert len(calls) == 70


@pytest.mark.parametrize(
    "override", [{}, {"optimized_attention_override": lambda function, *a, **k: function(*a, **k)}]
)
def test_what_another_packs_attention_gives_is_not_written_over(model, pulid, identity, monkeypatch, override):
    owned, patched = [], apply(model, pulid, identity)
    fuse_by(monkeypatch, lambda q, base, *more, overwrite: (owned.append(overwrite), base)[1])
    patched.model_options["transformer_options"].update(override)
    sample(patched, steps=1)
    assert {*owned} == {not override}


class TestMasks:
    def test_the_grid_is_the_sites_own_for_odd_sizes_too(self, model, pulid, identity, monkeypatch):
        seen = {}

        def recording(q, base, kv, rows, fusion, strength, mask, overwrite):
            seen[q.shape[1]] = mask
            return fuse(q, base, kv, rows, fusion, strength, mask, overwrite)

        fuse_by(monkeypatch, recording)
        top = torch.zeros(1, 33, 10)
        top[:, :11] = 1  # the upper third
        sample(apply(model, pulid, identity, attn_mask=top), height=33, width=13)
        assert set(seen) == {17 * 7, 9 * 4}  # 33 x 13 halved once and twice, rounded up
        rows = seen[9 * 4].view(9, 4)
        assert torch.equal(rows[:3], torch.ones(3, 4))
        assert torch.equal(rows[4:], torch.zeros(5, 4))

    def test_a_latent_that_is_shrunk_on_its_way_keeps_its_mask(self, model, pulid, identity):
        shrunk = PatchModelAddDownscale.execute(model, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")[0]
        out = sample(apply(shrunk, pulid, identity, attn_mask=torch.rand(1, 20, 20)), height=32, width=24)
        assert out.isfinite().all()

    def test_mask_m_applies_to_picture_m_and_the_last_repeats(self, model, pulid, identity):
        masks = torch.stack((torch.zeros(8, 8), torch.ones(8, 8)))
        out = sample(apply(model, pulid, identity, attn_mask=masks), batch=3)
        without, everywhere = sample(model, batch=3), sample(apply(model, pulid, identity), batch=3)
        assert torch.allclose(out[0], without[0], atol=1e-5)
        assert torch.allclose(out[1:], everywhere[1:], atol=1e-4)

    def test_two_people_with_a_mask_each(self, model, pulid, identity):
        left = torch.zeros(1, 16, 24)
        left[:, :, :12] = 1
        other = make_identity(2)
        both = apply(apply(model, pulid, identity, attn_mask=left), pulid, other, attn_mask=1 - left)
        assert residuals(both) == 2
        one = sample(apply(model, pulid, identity, attn_mask=left))
        assert not torch.allclose(sample(both), one, atol=1e-3)


class TestComposition:
    def test_editing_the_second_of_two_nodes_leaves_two_residuals_and_the_first_untouched(self, model, pulid, identity):
        first = apply(model, pulid, identity)
        before = sample(first)
        for weight in (0.1, 0.5, 0.9):
            second = apply(first, pulid, make_identity(2), weight=weight)
        assert residuals(second) == 2
        assert residuals(first) == 1
        assert torch.equal(sample(first), before)
        fresh = apply(apply(model, pulid, identity), pulid, make_identity(2), weight=0.9)
        assert torch.equal(sample(second), sample(fresh))

    def test_a_pack_that_calls_add_composes_on_ours_without_reaching_upstream(self, model, pulid, identity):
        upstream = apply(model, pulid, identity)
        before = sample(upstream)
        downstream = add_like_ipadapter(upstream)
        assert not torch.allclose(sample(downstream), before, atol=1e-3)
        assert torch.equal(sample(upstream), before)
        again = add_like_ipadapter(upstream)
        assert torch.equal(sample(again), sample(downstream))

    def test_ours_composes_on_a_pack_like_that(self, model, pulid, identity):
        theirs = add_like_ipadapter(model)
        before = sample(theirs)
        both = apply(theirs, pulid, identity)
        assert residuals(both) == 1
        assert torch.equal(sample(theirs), before)
        other_order = add_like_ipadapter(apply(model, pulid, identity))
        assert not torch.allclose(sample(both), before, atol=1e-3)
        assert sample(other_order).isfinite().all()

    def test_added_callbacks_keep_their_own_range(self, model, pulid, identity):
        patched = apply(model, pulid, identity)
        outside = add_like_ipadapter(patched, sigma_start=1e-3, sigma_end=0.0)
        assert torch.equal(sample(outside), sample(patched))

    def test_a_replacement_on_the_two_part_key_lies_below_ours_in_either_order(self, model, pulid, identity):
        def doubling(q, k, v, extra_options):
            calls.append(extra_options["block_index"])
            return 2 * torch.nn.functional.layer_norm(q, q.shape[-1:])

        pictures = []
        for order in ("before", "after"):
            calls = []
            replaced = model.clone() if order == "before" else apply(model, pulid, identity)
            replaced.set_model_attn2_replace(doubling, "middle", 0)
            pictures.append(sample(apply(replaced, pulid, identity) if order == "before" else replaced))
            assert sorted(set(calls)) == list(range(10))
        assert torch.equal(*pictures)

    def test_lora_before_and_after_gives_the_same_picture(self, model, pulid, identity):
        key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q.weight"
        weight = model.get_model_object(key)
        change = {key: (torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)),)}
        before, after = model.clone(), apply(model, pulid, identity)
        before.add_patches(change, 0.5)
        after.add_patches(change, 0.5)
        lora_first = sample(apply(before, pulid, identity))
        assert torch.equal(lora_first, sample(after))
        assert not torch.allclose(lora_first, sample(apply(model, pulid, identity)), atol=1e-4)

    def test_threads_share_a_patch_without_meeting(self, model, pulid, identity):
        patched = apply(model, pulid, identity, start_at=0.1, attn_mask=torch.rand(1, 32, 32))
        on = patched.model_options["transformer_options"]["patches_replace"]["attn2"][("middle", 0, 0)]
        channels = WIDTHS[-1]

        def work(number):
            with torch.inference_mode():
                generator = torch.Generator().manual_seed(number)
                q, k, v = torch.randn(3, 2, 24, channels, generator=generator)
                options = {
                    "n_heads": channels // 64,
                    "cond_or_uncond": [number % 2, 1 - number % 2],
                    "sigmas": torch.full((2,), 1.0 + number),
                    "activations_shape": [2, channels, 4, 6],
                }
                return on(q, k, v, options)

        alone = [work(number) for number in range(8)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, range(8)))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))

    def test_a_clone_holds_no_copies_of_tensors(self, model, pulid, identity):
        patched = apply(model, pulid, identity)
        clone = patched.clone().clone()
        for key, on in sites_of(patched).items():
            copy = sites_of(clone)[key]
            assert copy is not on
            assert copy.kv.keys is on.kv.keys and copy.kv.values is on.kv.values


def add_like_ipadapter(model, **kwargs):
    return add_callback(model, lambda out, q, *args, **_: 0.5 * q, **kwargs)


class Control(comfy.controlnet.ControlBase):
    """A ControlNet that adds nothing."""

    def get_control(self, x, t, cond, batched_number, transformer_options):
        return None


IDENTITY, UNCOND = 0, 1  # rows of keys and values
BOTH = {(POSITIVE, IDENTITY), (NEGATIVE, UNCOND)}
SECOND_TOO = BOTH | {(SECOND, IDENTITY)}


def areas_and_masks():
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    masked = conditioning(SECOND, mask=mask, mask_strength=1.0, set_area_to_bounds=False)
    return conditioning(POSITIVE, area=(32, 16, 0, 8), strength=1.0) + masked


LONGER = [[torch.full((1, 77 * 5, 2048), NEGATIVE), {"pooled_output": torch.zeros(1, 1280)}]]


def perpneg(model, neg_scale):
    guider = Guider_PerpNeg(model)
    guider.set_conds(conditioning(POSITIVE), conditioning(NEGATIVE), conditioning(EMPTY))
    guider.set_cfg(4.0, neg_scale)
    return guider


def dual_cfg(model):
    guider = Guider_DualCFG(model)
    guider.set_conds(conditioning(POSITIVE), conditioning(SECOND), conditioning(NEGATIVE))
    guider.set_cfg(4.0, 2.0)
    return guider


def unknown_guider(model, **branches):
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({name: conditioning(marker) for name, marker in branches.items()})
    guider.predict_noise = lambda x, timestep, model_options={}, seed=None: comfy.samplers.calc_cond_batch(
        guider.inner_model, [guider.conds[name] for name in branches], x, timestep, model_options
    )[0]
    return guider


@pytest.fixture
def rows_seen(monkeypatch):
    """The rows of every call of fuse."""
    seen = []

    def recording(q, base, kv, rows, *args, **options):
        seen.append(list(rows))
        return fuse(q, base, kv, rows, *args, **options)

    fuse_by(monkeypatch, recording)
    return seen


class TestTokensOfEveryPass:
    """Pairs of (what the conditioning is filled with, which row of keys and values it met), over all passes."""

    @pytest.fixture
    def met(self, model, pulid, identity, rows_seen):
        def run(change=lambda model: model, guider=lambda model: None, **options):
            def watch(n, context, value, extra_options):
                markers.append(context[:, 0, 0].tolist())
                return n, context, value

            markers, patched = [], apply(model, pulid, identity)
            patched.set_model_attn2_patch(watch)
            sample(change(patched), guider=guider(patched), **options)
            pairs = zip(markers, rows_seen, strict=True)
            return {pair for marker, rows in pairs for pair in zip(marker, rows, strict=True)}

        return run

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, BOTH),
            ({"cfg": 1.0}, {(POSITIVE, IDENTITY)}),
            ({"batch": 3}, BOTH),
            ({"positive": conditioning(POSITIVE) + conditioning(SECOND)}, SECOND_TOO),
            ({"positive": areas_and_masks()}, SECOND_TOO),
            ({"negative": LONGER}, BOTH),  # does not fit into one batch
            ({"positive": conditioning(POSITIVE, control=Control())}, BOTH),  # the same
            ({"change": lambda model: SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]}, BOTH),  # the negative alone
            ({"change": lambda model: PerturbedAttentionGuidance.execute(model, 3.0)[0]}, BOTH),  # the positive again
            ({"change": lambda model: PerpNeg.execute(model, conditioning(EMPTY), 1.0)[0]}, BOTH | {(EMPTY, UNCOND)}),
            ({"guider": lambda model: perpneg(model, 1.0)}, BOTH | {(EMPTY, UNCOND)}),
            ({"guider": lambda model: perpneg(model, 0.0)}, {(POSITIVE, IDENTITY), (EMPTY, UNCOND)}),
            ({"guider": dual_cfg}, SECOND_TOO),  # puts the negative first
        ],
        ids=["cfg", "cfg 1", "batch", "two positives", "areas and masks", "longer negative", "ControlNet", "SAG", "PAG",
             "PerpNeg", "PerpNeg guider", "PerpNeg guider without a negative", "dual CFG"],
    )  # fmt: skip
    def test_each_way_of_sampling(self, met, options, expected):
        assert met(**options, height=32, width=32) == expected

    @pytest.mark.parametrize("branch", ["uncond", "empty", "neg", "unconditional", "negative_2"])
    def test_a_branch_of_a_guider_that_nobody_knows_is_not_the_positive(self, met, branch):
        assert met(guider=lambda model: unknown_guider(model, positive=POSITIVE, **{branch: NEGATIVE})) == BOTH

    def test_a_guider_without_a_known_positive_is_told_in_the_log(self, met, caplog):
        assert met(guider=lambda model: unknown_guider(model, mine=POSITIVE)) == {(POSITIVE, UNCOND)}
        assert "PuLID is not applied: of this guider's branches, ['mine'], none is known" in caplog.text

    def test_one_identity_per_picture(self, model, pulid, rows_seen):
        sample(apply(model, pulid, make_identity(people=2)), batch=3)
        assert rows_seen and set(map(tuple, rows_seen)) <= {(2, 2, 2, 0, 1, 1), (0, 1, 1, 2, 2, 2)}

    def test_without_a_guider_index_0_is_the_positive(self):
        assert rows.without_a_run((1, 0), 4).identities(1) == (1, 1, 0, 0)


class TestAdvanced:
    def run(self, model, pulid, identity, **options):
        given = {
            "projection": "ortho_v2", "zero_tokens": -1, "weight": 0.8, "weight_curve": "flat", "start_at": 0.0,
            "end_at": 1.0, "input_blocks": 1.0, "middle_block": 1.0, "output_blocks": 1.0, "uncond": "zeros",
            "noise": 0.0, "noise_seed": 0, **options,
        }  # fmt: skip
        return PulidApplyAdvanced.execute(model, pulid, identity, **given)[0]

    def test_its_defaults_are_fidelity(self, model, pulid, identity):
        assert torch.equal(sample(self.run(model, pulid, identity)), sample(apply(model, pulid, identity)))

    @pytest.mark.parametrize(("projection", "method"), [("ortho", "extreme style"), ("none", "neutral")])
    def test_each_projection_has_its_methods_zero_tokens(self, model, pulid, identity, projection, method):
        ours = sample(self.run(model, pulid, identity, projection=projection))
        assert torch.equal(ours, sample(apply(model, pulid, identity, method=method)))

    def test_a_part_of_weight_0_is_not_patched(self, model, pulid, identity):
        patched = self.run(model, pulid, identity, middle_block=0.0, output_blocks=0.5)
        assert {key[0] for key in sites_of(patched)} == {"input", "output"}

    def test_curves_and_zero_tokens_change_the_picture(self, model, pulid, identity):
        pictures = [
            sample(self.run(model, pulid, identity, **options), steps=2)
            for options in ({}, {"weight_curve": "ease in"}, {"weight_curve": "ease out"}, {"zero_tokens": 80})
        ]
        assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(pictures) for b in pictures[:i])


class TestNoise:
    def test_noise_reaches_the_negative_branch_alone(self, noisy, identity):
        with_noise = noisy.weights.with_noise(identity, 0.5, 1)
        assert torch.equal(with_noise.cond, identity.cond)
        assert with_noise.uncond.shape == identity.uncond.shape

    @pytest.mark.parametrize("id_mix", [False, True])
    def test_the_noise_of_joined_photographs_lies_as_their_tokens_do(self, noisy, id_mix):
        alone, joined = (
            identity_of(torch.randn(photographs, 10, 2048), noisy.weights.zeros, "v1", "print", "one person", id_mix)
            for photographs in (1, 3)
        )
        expected = join_tokens([noisy.weights.with_noise(alone, 0.5, 1).uncond] * 3, id_mix)
        assert torch.equal(noisy.weights.with_noise(joined, 0.5, 1).uncond, expected)

    def test_it_changes_the_picture_and_follows_its_seed(self, model, noisy, identity):
        run = TestAdvanced().run
        pictures = [
            sample(run(model, noisy, identity, uncond="noise", noise=noise, noise_seed=seed))
            for noise, seed in ((0.0, 0), (0.5, 1), (0.5, 2), (0.5, 1))
        ]
        assert torch.equal(pictures[0], sample(apply(model, noisy, identity)))
        assert torch.equal(pictures[1], pictures[3])
        assert not torch.allclose(pictures[0], pictures[1], atol=1e-4)
        assert not torch.allclose(pictures[1], pictures[2], atol=1e-4)

    def test_seeds_that_change_at_every_run_do_not_pile_up(self, model, noisy):
        person = make_identity(4)
        for seed in range(4):
            TestAdvanced().run(model, noisy, person, uncond="noise", noise=0.5, noise_seed=seed)
        gc.collect()
        assert len(noisy.weights._noisy[person]) == 1
        assert sum(len(kept) for kept in noisy.weights._projected.values()) <= 4


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"start_at": 0.7, "end_at": 0.2}, "Swap them"),
            ({"attn_mask": torch.full((1, 8, 8), float("nan"))}, "NaN"),
            ({"attn_mask": torch.zeros(0, 8, 8)}, "shape"),
            ({"attn_mask": torch.zeros(1, 2, 3, 8, 8)}, "shape"),
        ],
    )
    def test_an_empty_range_and_masks_that_cannot_be_used(self, model, pulid, identity, options, words):
        with pytest.raises(InputError, match=words):
            apply(model, pulid, identity, **options)

    def test_an_identity_of_another_encoder_or_version(self, model, pulid):
        with pytest.raises(MismatchError, match=r"v1\.1 .*other.*v1 .*print"):
            apply(model, pulid, make_identity(version="v1.1", encoder="other"))

    def test_projections_of_other_widths_name_the_site(self, model, identity):
        wide = fakes.loaded(fakes.weights(IdProjections([2 * width for width in WIDTHS], device="meta")))
        with pytest.raises(MismatchError, match=r"made for 128 channels in input block 4.*has 64"):
            apply(model, wide, identity)

    @pytest.mark.parametrize("name", ["SD15", "SDXLRefiner", "SSD1B", "Flux"])
    def test_models_that_are_not_sdxl_are_named(self, pulid, identity, name):
        with pytest.raises(MismatchError, match=f"needs an SDXL model, found {name}"):
            apply(other_model(name), pulid, identity)


def other_model(name):
    """A tiny relative of SDXL by the host's own class; Flux has no UNet at all."""
    if name == "Flux":
        other = comfy_host.sdxl(MODEL_CHANNELS, seed=None)
        other.model.model_config, other.model.diffusion_model = type("Flux", (), {})(), torch.nn.Linear(1, 1)
        return other
    four_levels = {"channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2]}
    changes = {
        "SD15": {**four_levels, "context_dim": 768, "adm_in_channels": None, "num_classes": None,
                 "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
                 "transformer_depth_middle": 1, "use_linear_in_transformer": False},
        "SDXLRefiner": {**four_levels, "context_dim": 1280, "adm_in_channels": 2560,
                        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0], "transformer_depth_middle": 4,
                        "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0]},
        "SSD1B": {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1,
                  "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]},
    }[name]  # fmt: skip
    config = {**comfy_host.SDXL_CONFIG, "model_channels": MODEL_CHANNELS, "dtype": torch.float32, **changes}
    made = getattr(comfy.supported_models, name)(config)
    network = made.get_model({}, "", device=torch.device("meta"))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)


def test_a_slider_projects_nothing_again(model, pulid, identity, monkeypatch):
    apply(model, pulid, identity)

    def again(*args):
        raise AssertionError("keys and values were projected again")

    monkeypatch.setattr(pulid.weights.projections.module, "project", again)
    apply(model, pulid, identity, method="neutral", weight=0.3, start_at=0.2, attn_mask=torch.ones(1, 8, 8))
