"""The node that makes one identity of two."""

from comfy_api.latest import io

from ..pulid.identity import IdEmbedding
from ..pulid.tokens import MODES, combine
from .types import IdentitySocket


class PulidCombineIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_CombineIdentities",
            display_name="PuLID Combine Identities",
            category="PuLID",
            description="Makes one identity of two, which the same PuLID file has to have made.",
            inputs=[
                IdentitySocket.Input("identity_1", tooltip="The main person."),
                IdentitySocket.Input("identity_2", tooltip="The person that is mixed in, added or taken away."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="mix",
                    tooltip="mix: both people, all tokens of each, as id_mix does. auxiliary: the second as one more "
                    "photograph of the first (PuLID v1). average: a person between the two. add: the first with the "
                    "second on top. subtract: the first without what the second looks like.",
                ),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much the second counts in average (0 is the first alone, 1 the second alone), add and "
                    "subtract (0 leaves the first as it is). mix and auxiliary do not use it.",
                ),
            ],
            outputs=[IdentitySocket.Output("combined", display_name="identity")],
        )

    @classmethod
    def execute(cls, identity_1: IdEmbedding, identity_2: IdEmbedding, mode: str, weight: float) -> io.NodeOutput:
        return io.NodeOutput(combine(identity_1, identity_2, mode, weight))
