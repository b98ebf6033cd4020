"""Whose a row is, and which part of which picture, whatever stands between ComfyUI's batch and the network.

Each way of rearranging a batch is a small stand-in of what a real pack does; tests/neighbours/ runs the packs.
"""

import copy
import os
import random
from functools import partial

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import comfy.hooks
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy import context_windows
from pulid_sdxl.nodes.trace import Traced
from pulid_sdxl.pulid.errors import MismatchError

from . import sampling
from .sampling import NEGATIVE, POSITIVE, SECOND, Watcher, apply, conditioning, make_identity, sample

APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
NETWORK = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
CALC = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def watch(model, monkeypatch):
    watcher = Watcher()
    handle = watcher.attach(model, monkeypatch)
    yield watcher
    handle.remove()


TILES = [(y, x) for y in (0, 8) for x in (0, 8, 16)]  # of 8 x 8 latent pixels


def tiled(rearrange, batch_size, function, arguments):
    """As MultiDiffusion does: tiles of all rows after one another, a few at a time, and put together again."""
    x, c, t = arguments["input"], arguments["c"], arguments["timestep"]
    out = torch.zeros_like(x)
    for first in range(0, len(TILES), batch_size):
        boxes = TILES[first : first + batch_size]
        tiles = rearrange([x[:, :, y : y + 8, z : z + 8] for y, z in boxes])
        given = {
            name: rearrange([value] * len(boxes)) if isinstance(value, torch.Tensor) else value
            for name, value in c.items()
        }
        made = function(tiles, rearrange([t] * len(boxes)), **given)
        rows = rearrange([torch.arange(len(x)) + number * len(x) for number in range(len(boxes))])
        for place, row in enumerate(rows.tolist()):
            y, z = boxes[row // len(x)]
            out[row % len(x), :, y : y + 8, z : z + 8] = made[place]
    return out


def tiles_first(parts):
    return torch.cat(parts)


def rows_first(parts):
    return torch.stack(parts, dim=1).flatten(0, 1)


def backwards(parts):
    return torch.cat(parts).flip(0)


def unfolded(function, arguments):
    """Tiles by `unfold`, and their order by `gather`: the last becomes the first."""
    x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
    rows, channels, height, width = x.shape
    tiles = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(2, 3, 0, 1, 4, 5).reshape(-1, channels, 8, 8)
    order = torch.arange(len(tiles)).flip(0).view(-1, 1, 1, 1).expand(tiles.shape)
    of = order[:, 0, 0, 0] % rows
    given = {name: one[of] if isinstance(one, torch.Tensor) else one for name, one in c.items()}
    made = function(torch.gather(tiles, 0, order), t[of], **given).gather(0, order)
    made = made.view(height // 8, width // 8, rows, channels, 8, 8).permute(2, 3, 0, 4, 1, 5)
    return made.reshape(x.shape)


class TestTiles:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_tiles_may_be_unfolded_and_gathered(self, model, pulid, watch, batch):
        patched = apply(model, pulid, make_identity(people=batch), attn_mask=sampling.ramp(batch))
        patched.set_model_unet_function_wrapper(unfolded)
        sample(patched, noise=sampling.places(batch))
        watch.check(batch, batch)

    @pytest.mark.parametrize("rearrange", [tiles_first, rows_first, backwards])
    @pytest.mark.parametrize("batch_size", [1, 4, 6])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_tiles_keep_their_prompt_their_picture_and_their_part_of_the_mask(
        self, model, pulid, watch, rearrange, batch_size, batch
    ):
        people = masks = batch
        patched = apply(model, pulid, make_identity(people=people), attn_mask=sampling.ramp(masks))
        patched.set_model_unet_function_wrapper(partial(tiled, rearrange, batch_size))
        sample(patched, noise=sampling.places(batch))
        watch.check(people, masks)

    def test_a_tiler_beneath_apply_is_followed_too(self, model, pulid, watch):
        below = model.clone()
        below.set_model_unet_function_wrapper(partial(tiled, tiles_first, 4))
        sample(apply(below, pulid, make_identity(), attn_mask=sampling.ramp()), noise=sampling.places())
        watch.check(1, 1)

    @pytest.mark.parametrize("stage", [APPLY_MODEL, NETWORK])
    def test_wrappers_of_the_model_and_of_the_network_may_rearrange(self, model, pulid, watch, stage):
        def backwards(executor, x, t, first, second, *args, **kwargs):
            rows = list(reversed(range(len(x))))
            given = [one[rows] if isinstance(one, torch.Tensor) else one for one in (first, second, *args)]
            kwargs = {name: one[rows] if isinstance(one, torch.Tensor) else one for name, one in kwargs.items()}
            return executor(x[rows], t[rows], *given, **kwargs)[rows]

        patched = apply(model, pulid, make_identity(people=2), attn_mask=sampling.ramp(2))
        patched.add_wrapper_with_key(stage, "backwards", backwards)
        sample(patched, noise=sampling.places(2))
        if stage == NETWORK:  # which is watched from outside
            for call in watch.calls:
                call.x, call.prompts = call.x.flip(0), call.prompts[::-1]
        watch.check(2, 2)

    def test_rolled_pictures_are_followed(self, model, pulid, watch):
        def rolled(function, arguments):
            x = arguments["input"].roll((4, 6), dims=(-2, -1))
            return function(x, arguments["timestep"], **arguments["c"]).roll((-4, -6), dims=(-2, -1))

        patched = apply(model, pulid, make_identity(), attn_mask=sampling.ramp())
        patched.set_model_unet_function_wrapper(rolled)
        sample(patched, noise=sampling.places())
        watch.check(1, 1)

    def test_tiles_within_an_area_lie_where_the_area_lies(self, model, pulid, watch):
        def halves(function, arguments):
            x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
            return torch.cat([function(half, t, **c) for half in x.chunk(2, dim=2)], dim=2)

        patched = apply(model, pulid, make_identity(), attn_mask=sampling.ramp())
        patched.set_model_unet_function_wrapper(halves)
        area = conditioning(POSITIVE, area=(8, 16, 8, 0), strength=1.0)
        sample(patched, noise=sampling.places(), positive=conditioning(SECOND) + area)
        assert {tuple(call.x.shape[-2:]) for call in watch.calls} == {(8, 24), (4, 16)}
        watch.check(1, 1)

    def anew(self, function, arguments):
        """Gives the network a batch that nothing can be told of but the prompts in it."""
        order = list(reversed(range(len(arguments["input"]))))
        c = {name: one[order] if isinstance(one, torch.Tensor) else one for name, one in arguments["c"].items()}
        x = torch.tensor(arguments["input"].tolist())[order]
        return function(x, arguments["timestep"][order], **c)[order]

    @pytest.mark.parametrize("prompts", [[POSITIVE], [POSITIVE, SECOND]])
    def test_where_a_batch_is_made_anew_the_prompts_tell(self, model, pulid, watch, prompts):
        patched = apply(model, pulid, make_identity(), attn_mask=sampling.ramp())
        patched.set_model_unet_function_wrapper(self.anew)
        [[_, pooled]] = conditioning(POSITIVE)
        each = torch.cat([conditioning(prompt)[0][0] for prompt in prompts])  # a prompt for each picture
        sample(patched, noise=sampling.places(len(prompts)), positive=[[each, pooled]])
        watch.check(1, 1)

    @pytest.mark.parametrize(("people", "masks", "negative", "words"), [
        (2, None, NEGATIVE, "without saying which they are"),
        (1, 2, NEGATIVE, "without saying which they are"),
        (1, None, POSITIVE, "Positive and negative prompt are equal"),
    ])  # fmt: skip
    def test_what_cannot_be_known_is_an_error(self, model, pulid, people, masks, negative, words):
        mask = sampling.ramp(masks) if masks else None
        patched = apply(model, pulid, make_identity(people=people), attn_mask=mask)
        patched.set_model_unet_function_wrapper(self.anew)
        with pytest.raises(MismatchError, match=words):
            sample(patched, noise=sampling.places(2), negative=conditioning(negative))

    def test_a_part_of_which_nothing_tells_where_it_lies_is_an_error_with_a_mask_alone(self, model, pulid, watch):
        def half(executor, inner, conds, x, *args):
            out = executor(inner, conds, x[:, :, :8], *args)
            return [torch.cat([one, one], dim=2) for one in out]

        for mask in (None, sampling.ramp()):
            patched = apply(model, pulid, make_identity(), attn_mask=mask)
            patched.add_wrapper_with_key(CALC, "half", half)
            if mask is None:
                sample(patched, noise=sampling.places())
                watch.check()
            else:
                with pytest.raises(MismatchError, match="nothing says which parts of it"):
                    sample(patched, noise=sampling.places())


def coupled(regions):
    """As attention couples do: the queries of a prompt once for each region, each with a prompt of its own."""

    def before(n, k, v, extra_options):
        chunks = len(extra_options["cond_or_uncond"])
        queries, keys = [], []
        for chunk, own, prompt in zip(extra_options["cond_or_uncond"], n.chunk(chunks), k.chunk(chunks), strict=True):
            times = 1 if chunk == 1 else regions
            queries.append(own.repeat(times, 1, 1))
            keys += [prompt * (1 + number) for number in range(times)]
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def after(n, extra_options):
        chunks, position, out = extra_options["cond_or_uncond"], 0, []
        shares = [1 if chunk == 1 else regions for chunk in chunks]
        rows = len(n) // sum(shares)
        for share in shares:
            out.append(n[position : position + share * rows].view(share, rows, *n.shape[1:]).mean(dim=0))
            position += share * rows
        return torch.cat(out)

    return before, after


@pytest.mark.parametrize("move", [
    lambda x: x.mT, lambda x: x.moveaxis(2, 3), lambda x: x.swapdims(0, 1), lambda x: x.clone().copy_(x.flip(0)),
])  # fmt: skip
def test_the_map_goes_where_the_pixels_go(move):
    batch = Traced.of(torch.rand(2, 2, 4, 4))  # of which every side looks like another
    assert torch.equal(move(batch).origins, move(batch.origins)) and not torch.equal(move(batch).origins, batch.origins)


class TestAttentionCouples:
    @pytest.mark.parametrize("regions", [2, 3])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_all_regions_of_a_prompt_have_its_identity(self, model, pulid, watch, regions, batch):
        patched = apply(model, pulid, make_identity(people=batch), attn_mask=sampling.ramp(batch))
        before, after = coupled(regions)
        patched.set_model_attn2_patch(before)
        patched.set_model_attn2_output_patch(after)
        sample(patched, noise=sampling.places(batch), steps=2)
        for call in watch.calls:
            expected = []
            for prompt in call.prompts[::batch]:
                own = list(range(batch)) * regions if prompt > 0 else [batch] * batch
                expected += own
            assert len(call.sites) == 70
            assert all(rows == expected for rows, _, _ in call.sites)

    def test_regions_may_come_with_a_hook_on_the_prompt(self, model, pulid, watch):
        before, after = coupled(4)
        patches = {"patches": {"attn2_patch": [before], "attn2_output_patch": [after]}}
        group = comfy.hooks.HookGroup()
        group.add(comfy.hooks.TransformerOptionsHook(patches, comfy.hooks.EnumHookScope.HookedOnly))
        positive = comfy.hooks.set_hooks_for_conditioning(conditioning(POSITIVE), group) + conditioning(SECOND)
        sample(apply(model, pulid, make_identity(people=2)), positive=positive, noise=sampling.places(2))
        found = [rows for call in watch.calls for rows in {tuple(rows) for rows, *_ in call.sites}]
        assert sorted(found) == [(0, 1) * 4, (2, 2, 0, 1)] or sorted(found) == [(0, 1) * 4, (0, 1, 2, 2)]

    def test_regions_may_begin_and_end_while_sampling(self, model, pulid, watch):
        patched = apply(model, pulid, make_identity())
        before, after = coupled(3)

        def begun(options):  # at the second of three steps, as packs that act from one percent to another
            return options["sigmas"][0] not in (options["sample_sigmas"][0], options["sample_sigmas"][2])

        def widened(n, k, v, options):
            return before(n, k, v, options) if begun(options) else (n, k, v)

        def narrowed(n, options):
            return after(n, options) if begun(options) else n

        patched.set_model_attn2_patch(widened)
        patched.set_model_attn2_output_patch(narrowed)
        sample(patched, noise=sampling.places(), steps=3)
        assert [len(call.sites[0][0]) for call in watch.calls] == [2, 4, 2]

    def test_queries_that_nothing_tells_the_origin_of_are_an_error(self, model, pulid):
        patched = apply(model, pulid, make_identity())

        def anew(n, k, v, extra_options):
            return torch.zeros(3, *n.shape[1:]), k[:1].expand(3, -1, -1), v[:1].expand(3, -1, -1)

        patched.set_model_attn2_patch(anew)
        with pytest.raises(MismatchError, match=r"given 2 rows, but 3 come to the cross-attention"):
            sample(patched)

    def test_a_patch_is_called_as_often_as_without_us(self, model, pulid):
        counts = []
        for changed in (model.clone(), apply(model, pulid, make_identity())):
            calls = []
            changed.set_model_attn2_patch(lambda n, k, v, _, calls=calls: (calls.append(type(n)), (n, k, v))[1])
            sample(changed)
            counts.append(len(calls))
        assert counts[0] == counts[1] == 70


class TestContextWindows:
    def windows(self, patched, closed_loop, length=3, **options):
        """What ContextWindowsManual puts on a model."""
        schedule = "looped_uniform" if closed_loop else "standard_static"
        patched.model_options["context_handler"] = context_windows.IndexListContextHandler(
            context_windows.get_matching_context_schedule(schedule),
            context_windows.get_matching_fuse_method("flat"),
            context_length=length, context_overlap=1, closed_loop=closed_loop, **options,
        )  # fmt: skip
        return patched

    @pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # 0.3.64
    @pytest.mark.parametrize("closed_loop", [False, True])
    def test_comfyuis_windows_keep_each_pictures_identity_and_mask(self, model, pulid, watch, closed_loop):
        patched = apply(model, pulid, make_identity(people=5), attn_mask=sampling.ramp(5))
        windowed = self.windows(patched, closed_loop=closed_loop)
        sample(windowed, steps=4, noise=sampling.places(5))  # 0.3.64 wants as many sigmas as pictures
        assert len(watch.calls) > 1
        watch.check(5, 5)

    @pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # 0.3.64
    @pytest.mark.parametrize("dim", [2, 3])
    def test_windows_of_lines_or_columns_have_their_part_of_the_mask(self, model, pulid, watch, dim):
        patched = apply(model, pulid, make_identity(), attn_mask=sampling.ramp())
        windowed = self.windows(patched, closed_loop=False, dim=dim, length=12)
        windowed.model_options["context_handler"].causal_window_fix = False  # newer ones put a line before: 13
        sample(windowed, steps=4, noise=sampling.places())
        assert {call.x.shape[dim] for call in watch.calls} == {12}
        watch.check(1, 1)

    def other_windows(self, tell):
        """As AnimateDiff-Evolved does; whether the options tell which pictures are in a window."""

        def run(executor, inner, conds, x, timestep, model_options):
            outs = [torch.zeros_like(x) for _ in conds]
            for window in ([0, 1, 2], [4, 3, 5]):
                options = {**model_options, "transformer_options": {**model_options["transformer_options"]}}
                if tell:
                    params = {"sub_idxs": window, "full_length": len(x), "context_length": len(window)}
                    options["transformer_options"]["ad_params"] = params
                for out, part in zip(outs, executor(inner, conds, x[window], timestep[window], options), strict=True):
                    out[window] = part
            return outs

        return run

    def test_animatediffs_windows_too(self, model, pulid, watch):
        patched = apply(model, pulid, make_identity(people=6), attn_mask=sampling.ramp(6))
        patched.add_wrapper_with_key(CALC, "windows", self.other_windows(tell=True))
        sample(patched, noise=sampling.places(6))
        watch.check(6, 6)

    def test_windows_that_do_not_tell_are_an_error_where_pictures_differ(self, model, pulid, watch):
        for people in (1, 6):
            patched = apply(model, pulid, make_identity(people=people))
            patched.add_wrapper_with_key(CALC, "windows", self.other_windows(tell=False))
            if people == 1:
                sample(patched, noise=sampling.places(6))
                watch.check()
            else:
                with pytest.raises(MismatchError, match="without saying which they are"):
                    sample(patched, noise=sampling.places(6))


class TestAreas:
    def test_the_mask_is_cut_where_an_area_lies(self, model, pulid, watch):
        right = conditioning(POSITIVE, area=(16, 8, 0, 12), strength=1.0)
        lower = conditioning(SECOND, area=("percentage", 0.5, 1.0, 0.5, 0.0), strength=1.0)
        patched = apply(model, pulid, make_identity(), attn_mask=sampling.ramp())
        sample(patched, noise=sampling.places(), positive=right + lower, negative=conditioning(NEGATIVE))
        assert {tuple(call.x.shape[-2:]) for call in watch.calls} >= {(16, 8), (8, 24)}
        watch.check(1, 1)

    @pytest.mark.parametrize("seed", range(4))
    def test_areas_of_any_size_on_latents_of_any_size(self, model, pulid, watch, seed):
        """Some reach beyond the latent; two pictures, two prompts."""
        draw = random.Random(seed).randint
        height, width = draw(9, 21), draw(9, 21)
        positive = []
        for number in range(2):
            area = draw(5, height), draw(5, width), draw(0, height - 5), draw(0, width - 5)
            positive += conditioning(POSITIVE + number, area=area, strength=1.0)
        patched = apply(model, pulid, make_identity(people=2), attn_mask=sampling.ramp(2, height, width))
        sample(patched, noise=sampling.places(2, height, width), positive=positive)
        assert len(watch.calls) >= 2
        for call in watch.calls:
            lines = call.x[:, 0, :, 0]  # of each row
            for rows, mask, tokens in call.sites:
                assert rows == call.expected_rows(2)
                grids = [(-(-call.x.shape[2] // by), -(-call.x.shape[3] // by)) for by in (2, 4)]
                grid = next(grid for grid in grids if grid[0] * grid[1] == tokens)
                picture = call.x[:, 2].mean(dim=(1, 2)).round()
                wanted = ((lines.mean(dim=1) + 0.5) / height) / 2 + picture / 20
                found = mask.expand(len(rows), tokens).view(-1, *grid)
                assert torch.allclose(found.mean(dim=(1, 2)), wanted, atol=1e-3)
                assert torch.allclose(found.std(dim=2), torch.zeros(len(rows), grid[0]), atol=1e-4)

    def test_a_mask_of_the_left_leaves_an_area_on_the_right_as_it_is(self, model, pulid):
        left = torch.zeros(1, 128, 192)
        left[:, :, :96] = 1
        right = {"positive": conditioning(POSITIVE, area=(16, 12, 0, 12)), "cfg": 1.0}
        masked = sample(apply(model, pulid, make_identity(), attn_mask=left), **right)
        assert torch.allclose(masked, sample(model, **right), atol=1e-5)


def test_a_pack_that_kept_the_models_options_since_before_sampling_has_its_rows_too(model, pulid, watch):
    patched = apply(model, pulid, make_identity())
    kept = copy.deepcopy(patched.model_options)  # as Automatic CFG does

    def negative_again(args):
        x, sigma, conds = args["input"], args["sigma"], [args["uncond"]]
        return args["denoised"] + comfy.samplers.calc_cond_batch(args["model"], conds, x, sigma, kept)[0]

    patched.set_model_sampler_post_cfg_function(negative_again)
    sample(patched, noise=sampling.places())
    assert [call.prompts for call in watch.calls][1:] == [[NEGATIVE]]
    watch.check()


def test_a_pack_that_calls_the_model_itself_is_read_by_its_prompts(model, pulid, watch):
    def own_pass(args):
        conds, x = [cond for cond in args["conds"] if cond], args["input"]
        prompts = torch.cat([cond[0]["model_conds"]["c_crossattn"].cond for cond in conds])
        pooled = torch.cat([cond[0]["model_conds"]["y"].cond for cond in conds])
        options = {**args["model_options"]["transformer_options"], "cond_or_uncond": [0, 1], "sigmas": args["sigma"]}
        rows = x.repeat(len(conds), 1, 1, 1), args["sigma"].repeat(len(conds))
        return args["model"].apply_model(*rows, c_crossattn=prompts, y=pooled, transformer_options=options).chunk(2)

    patched = apply(model, pulid, make_identity(), attn_mask=sampling.ramp())
    patched.model_options["sampler_calc_cond_batch_function"] = own_pass
    sample(patched, noise=sampling.places())
    watch.check(1, 1)
