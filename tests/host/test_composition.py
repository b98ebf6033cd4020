"""With what other packs and nodes do to a model before and after Apply; tests/neighbours/ runs the packs themselves."""

import os

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import copy
from types import SimpleNamespace

import comfy.ldm.modules.attention as host_attention
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM
from pulid_sdxl.nodes import host
from pulid_sdxl.pulid.attention import fuse
from pulid_sdxl.pulid.errors import InputError
from torch._dynamo.utils import counters

from . import sampling
from .sampling import NEGATIVE, SITES, add_callback, apply, conditioning, sample, sites_of

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def said(monkeypatch):
    """What is said on nodes while sampling."""
    texts = []
    monkeypatch.setattr(host, "say", lambda text, node_id=None: texts.append((node_id, text)))
    monkeypatch.setattr(host, "executing_node", lambda: "7", raising=False)
    return texts


class TestRange:
    """start_at and end_at are of the model that samples, whatever becomes of it behind Apply."""

    def resampled(self, model):
        return ModelSamplingContinuousEDM().patch(model, "v_prediction", 120.0, 0.002)[0]

    def test_a_model_sampling_node_after_apply_gives_the_same_picture_as_before_it(self, model, pulid, identity):
        before = apply(self.resampled(model), pulid, identity, start_at=0.2, end_at=0.8)
        after = self.resampled(apply(model, pulid, identity, start_at=0.2, end_at=0.8))
        assert torch.equal(sample(after, steps=5), sample(before, steps=5))

    def test_it_acts_in_the_steps_that_it_names(self, model, pulid, identity, monkeypatch):
        acted = []

        def counting(q, base, kv, rows, fusion, strength, *more, **options):
            acted.append(float(strength))
            return fuse(q, base, kv, rows, fusion, strength, *more, **options)

        sampling.fuse_by(monkeypatch, counting)
        changed = self.resampled(apply(model, pulid, identity, start_at=0.2, end_at=0.8))
        model_sampling = changed.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, "normal", 10)[:-1]
        least, most = (model_sampling.percent_to_sigma(share) for share in (0.8, 0.2))
        inside = [bool(least <= sigma <= most) for sigma in sigmas]
        sample(changed, steps=10)
        assert 0 < sum(inside) < 10
        assert [bool(step) for step in acted[:: len(SITES)]] == inside


class TestCallbacks:
    @pytest.mark.parametrize("nothing", [0, 0.0, False])
    def test_a_callback_may_return_a_number(self, model, pulid, identity, nothing):
        patched = apply(model, pulid, identity)
        added = add_callback(patched, lambda *args, **kwargs: nothing)
        assert torch.equal(sample(added), sample(patched))

    def test_a_tensor_of_another_dtype_is_converted(self, model, pulid, identity):
        patched = apply(model, pulid, identity)
        added = add_callback(patched, lambda out, q, *args, **kwargs: q.to(torch.float64))
        assert sample(added).dtype == torch.float32

    def test_a_side_branch_cannot_change_what_lies_below_ours(self, model, pulid, identity):
        below = add_callback(model, lambda out, q, *args, **kwargs: 0.1 * q)
        ours = apply(below, pulid, identity)
        further = ours.clone()
        before = sample(ours)
        add_callback(below, lambda out, q, *args, **kwargs: 5 * q)
        assert torch.equal(sample(ours), before)
        assert torch.equal(sample(further), before)

    def test_a_clone_cannot_change_what_lies_below_its_origin(self, model, pulid, identity):
        ours = apply(add_callback(model, lambda out, q, *args, **kwargs: 0.1 * q), pulid, identity)
        before = sample(ours)
        for patch in sites_of(ours.clone()).values():
            patch.base.add(lambda out, q, *args, **kwargs: 5 * q)
        assert torch.equal(sample(ours), before)


class TestSurplusKeys:
    """As NAG does it: the network is handed more prompts than rows."""

    def with_negatives(self, model, count=1):
        def wrapper(executor, x, timesteps, context, *args, **kwargs):
            further = torch.full((count, *context.shape[1:]), NEGATIVE)
            return executor(x, timesteps, torch.cat((context, further)), *args, **kwargs)

        changed = model.clone()
        stage = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        changed.add_wrapper_with_key(stage, "negatives", wrapper)
        return changed

    @pytest.mark.parametrize("batch", [1, 2])
    def test_the_base_attention_gets_the_prompts_that_belong_to_its_rows(self, model, pulid, identity, said, batch):
        patched = apply(model, pulid, identity)
        expected = sample(patched, batch=batch, steps=2)
        assert torch.equal(sample(self.with_negatives(patched, batch), batch=batch, steps=2), expected)
        assert [node for node, text in said if text.startswith("NAG is inactive")] == ["7"]

    def test_keys_with_a_dimension_more_are_of_a_pack_that_injects_prompts(self, model, pulid, identity, said):
        patched = apply(model, pulid, identity)
        injected = patched.clone()
        injected.set_model_attn2_patch(lambda n, k, v, _: (n, *[torch.stack((k, k + 1))] * 2))
        assert not torch.allclose(sample(injected, cfg=1.0), sample(patched, cfg=1.0), atol=1e-3)
        assert said == []


class TestDisplaced:
    def overwrite(self, model, sites=SITES[:60]):
        def attention_of_a_pack(q, k, v, extra_options):
            return host_attention.optimized_attention(q, k, v, extra_options["n_heads"])

        changed = model.clone()
        for site in sites:
            changed.set_model_attn2_replace(attention_of_a_pack, site.part, site.number, site.block)
        return changed

    def test_it_is_named_on_the_node_once_with_the_order_that_works(self, model, pulid, identity, said):
        sample(self.overwrite(apply(model, pulid, identity)), steps=2)
        [(node, text)] = said
        assert node == "7"
        assert __name__ in text and "60 of 70" in text and "before Apply PuLID" in text

    def test_the_other_order_is_silent_and_of_two_nodes_the_lost_one_is_named(self, model, pulid, identity, said):
        sample(apply(self.overwrite(model), pulid, identity))
        assert said == []
        sample(apply(self.overwrite(apply(model, pulid, identity)), pulid, identity))
        assert len(said) == 1 and "60 of 70" in said[0][1]

    def wrap(self, model, make):
        changed = model.clone()
        for site in SITES:
            theirs = make(sites_of(changed)[site.key])
            changed.set_model_attn2_replace(theirs, site.part, site.number, site.block)
        return changed

    def test_packs_that_wrap_what_they_find_are_silent(self, model, pulid, identity, said):
        class Wrapping:
            def __init__(self, before):
                self.chain = [before]

            def __call__(self, *args):
                return self.chain[0](*args)

        def closure(before):
            return lambda *args: before(*args)

        def default(before):
            def call(q, k, v, options, before=before):
                return before(q, k, v, options)

            return call

        def kept(before):  # in the options of a model, on an object
            held = SimpleNamespace(options={"transformer_options": {"patches_replace": {"attn2": {0: before}}}})
            return lambda *args: held.options["transformer_options"]["patches_replace"]["attn2"][0](*args)

        for make in (closure, Wrapping, default, kept, lambda before: closure(Wrapping(before))):
            sample(self.wrap(apply(model, pulid, identity), make))
        assert said == []

    def test_models_that_are_copied_know_their_node(self, model, pulid, identity, said):
        patched = apply(model, pulid, identity)
        patched.model_options = copy.deepcopy(patched.model_options)
        sample(self.overwrite(patched.clone()))
        assert len(said) == 1


class TestMaskOfATile:
    @pytest.mark.parametrize("size", [(256, 192), (128, 128), (120, 90)])
    def test_a_mask_larger_than_the_picture_or_of_another_shape_is_told(self, model, pulid, identity, said, size):
        sample(apply(model, pulid, identity, attn_mask=torch.ones(1, *size)))
        assert len(said) == 1
        assert f"{size[1]} x {size[0]} px is fitted to the 192 x 128 px" in said[0][1]

    @pytest.mark.parametrize("size", [(128, 192), (64, 96), (16, 24)])
    def test_one_of_its_shape_is_not(self, model, pulid, identity, said, size):
        sample(apply(model, pulid, identity, attn_mask=torch.ones(1, *size)))
        assert said == []


@pytest.mark.parametrize("mask", [torch.zeros(1, 64, 64), torch.zeros(2, 16, 24)])
def test_an_empty_mask_has_no_effect_and_says_so(model, pulid, identity, said, mask):
    assert apply(model, pulid, identity, attn_mask=mask) is model
    assert "mask is empty" in said[0][1]


@pytest.mark.parametrize("mask", [[[1.0]], "white", 1.0])
def test_what_is_no_mask_is_told_in_words(model, pulid, identity, mask):
    with pytest.raises(InputError, match=r"attn_mask must be a mask .*, found"):
        apply(model, pulid, identity, attn_mask=mask)


def test_equal_prompts_are_told_apart_by_comfyuis_order(model, pulid, identity):
    both = {"positive": conditioning(NEGATIVE), "negative": conditioning(NEGATIVE)}
    assert sample(apply(model, pulid, identity), **both).isfinite().all()


def test_a_compiled_model_stays_one_graph_and_gives_the_same_picture(model, pulid, identity, monkeypatch):
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)  # no break of its own
    mask = torch.rand(1, 128, 192, generator=torch.Generator().manual_seed(1))
    patched = apply(model, pulid, identity, start_at=0.05, attn_mask=mask)
    expected = sample(patched, steps=2)
    torch._dynamo.reset()
    counters.clear()
    set_torch_compile_wrapper(patched, backend="eager")
    compiled = sample(patched, steps=2)
    assert (sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]) == (0, 1)
    assert torch.allclose(compiled, expected, atol=2e-5 * expected.std())
