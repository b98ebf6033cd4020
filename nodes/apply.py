"""The nodes that put an identity into a model."""

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..pulid.attention import METHODS, Fusion
from ..pulid.errors import InputError, MismatchError
from ..pulid.identity import IdEmbedding
from ..pulid.networks import PulidWeights
from ..pulid.schedule import CURVES, Schedule
from ..pulid.sites import SITES
from . import host
from .checked import checked, read_mask
from .patch import TokenMask, patch_model
from .texts import described
from .types import IdentitySocket, LoadedPulid, PulidSocket

MODEL = io.Model.Input("model")
PULID = PulidSocket.Input("pulid")
IDENTITY = IdentitySocket.Input("identity")
WEIGHT = io.Float.Input("weight", default=0.8, min=-1.0, max=5.0, step=0.05)
START = io.Float.Input("start_at", default=0.0, min=0.0, max=1.0, step=0.001)
END = io.Float.Input("end_at", default=1.0, min=0.0, max=1.0, step=0.001)
PART_WEIGHTS = [
    io.Float.Input(part, default=1.0, min=0.0, max=2.0, step=0.05)
    for part in ("input_blocks", "middle_block", "output_blocks")
]
NOISE = io.Float.Input("noise", default=0.0, min=0.0, max=1.0, step=0.05)
MASK = io.Mask.Input("attn_mask", optional=True)
PATCHED = io.Model.Output("patched_model", display_name="model")


@described
@checked
class PulidApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_Apply",
            display_name="Apply PuLID (SDXL)",
            category="PuLID",
            inputs=[
                MODEL,
                PULID,
                IDENTITY,
                io.Combo.Input("method", options=list(METHODS), default="fidelity"),
                WEIGHT,
                START,
                END,
                MASK,
            ],
            outputs=[PATCHED],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, pulid: LoadedPulid, identity: IdEmbedding, method: str, weight: float,
        start_at: float, end_at: float, attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        chosen = METHODS[method][identity.version]
        how = Application(
            chosen.fusion,
            chosen.zero_tokens,
            site_weights=[weight] * len(SITES),
            start_at=start_at,
            end_at=end_at,
            attn_mask=attn_mask,
        )
        return io.NodeOutput(apply(model, pulid.weights, identity, how))


@described
@checked
class PulidApplyAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_ApplyAdvanced",
            display_name="Apply PuLID Advanced (SDXL)",
            category="PuLID",
            inputs=[
                MODEL,
                PULID,
                IDENTITY,
                io.Combo.Input(
                    "projection", options=[fusion.value for fusion in PROJECTIONS], default=Fusion.ORTHOGONAL_V2.value
                ),
                io.Int.Input("zero_tokens", default=-1, min=-1, max=80),
                WEIGHT,
                io.Combo.Input("weight_curve", options=list(CURVES), default="flat"),
                START,
                END,
                *PART_WEIGHTS,
                io.Combo.Input("uncond", options=["zeros", "noise"], default="zeros"),
                NOISE,
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # the editor would change it, and with it the model, at every run
                ),
                MASK,
            ],
            outputs=[PATCHED],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, pulid: LoadedPulid, identity: IdEmbedding, projection: str, zero_tokens: int,
        weight: float, weight_curve: str, start_at: float, end_at: float, input_blocks: float, middle_block: float,
        output_blocks: float, uncond: str, noise: float, noise_seed: int, attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        fusion = Fusion(projection)
        if zero_tokens < 0:
            zero_tokens = METHODS[PROJECTIONS[fusion]][identity.version].zero_tokens
        parts = {"input": input_blocks, "middle": middle_block, "output": output_blocks}
        if uncond == "noise" and noise > 0:
            identity = pulid.weights.with_noise(identity, noise, noise_seed)
        how = Application(
            fusion,
            zero_tokens,
            site_weights=[weight * parts[site.part] for site in SITES],
            curve=weight_curve,
            start_at=start_at,
            end_at=end_at,
            attn_mask=attn_mask,
        )
        return io.NodeOutput(apply(model, pulid.weights, identity, how))


# The projections a user can choose, and the method whose number of zero tokens suits each.
PROJECTIONS = {Fusion.ORTHOGONAL_V2: "fidelity", Fusion.ORTHOGONAL: "extreme style", Fusion.PLAIN: "neutral"}


EMPTY_MASK = (
    "PuLID has no effect: its mask is empty. Load Image gives an empty mask for a picture without transparency; paint "
    "one, or take the mask away for the whole picture."
)


@dataclass(frozen=True, eq=False)
class Application:
    """How an identity goes into a model.

    site_weights  for each of the 70 sites
    curve         how the weight runs from start_at to end_at, percents of sampling 0..1: one of CURVES
    attn_mask     a MASK, where in the picture it acts
    older         as the pack of older shared workflows: masks are read at the middle of each place, with values beyond
                  0..1 too, and sites that a smaller SDXL (SSD-1B) lacks are left out
    """

    fusion: Fusion
    zero_tokens: int
    site_weights: list[float]
    curve: str = "flat"
    start_at: float = 0.0
    end_at: float = 1.0
    attn_mask: Tensor | None = None
    older: bool = False


def apply(model: ModelPatcher, weights: PulidWeights, identity: IdEmbedding, how: Application) -> ModelPatcher:
    """The patched model; the model itself where no site has a weight. Raises MismatchError, InputError."""
    check_pair(weights, identity)
    host.check_layout(model, weights.projections.module.widths, partial=how.older)
    if how.start_at > how.end_at:
        raise InputError(
            f"start_at ({how.start_at}) lies after end_at ({how.end_at}), so PuLID would never act. Swap them."
        )
    mask = None
    if how.attn_mask is not None:
        read = read_mask(how.attn_mask, "attn_mask", as_given=how.older)
        if not read.any():
            host.say(EMPTY_MASK)
            return model
        mask = TokenMask(read, "bilinear" if how.older else "area")
    site_weights = [
        weight if host.cross_attention(model, site) else 0.0
        for site, weight in zip(SITES, how.site_weights, strict=True)
    ]
    if not any(site_weights):
        return model
    percent_to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    schedule = Schedule.make(percent_to_sigma, how.start_at, how.end_at, how.curve, model.load_device)
    site_kvs = weights.project(identity, model.load_device)
    return patch_model(model, site_kvs, how.fusion, how.zero_tokens, site_weights, schedule, mask)


def check_pair(weights: PulidWeights, identity: IdEmbedding) -> None:
    """Raises MismatchError unless the identity was made with this PuLID file's encoder."""
    if (weights.version, weights.fingerprint) != (identity.version, identity.encoder):
        raise MismatchError(
            f"The identity was made with PuLID {identity.version} (encoder {identity.encoder}), but the loaded PuLID "
            f"is {weights.version} (encoder {weights.fingerprint}). Encode the identity again with that PuLID file."
        )
