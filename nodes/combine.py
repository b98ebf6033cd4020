"""The node that makes one identity of two."""

from comfy_api.latest import io

from ..pulid.identity import IdEmbedding
from ..pulid.tokens import MODES, combine
from .checked import checked
from .texts import described
from .types import IdentitySocket


@described
@checked
class PulidCombineIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_CombineIdentities",
            display_name="PuLID Combine Identities",
            category="PuLID",
            inputs=[
                IdentitySocket.Input("identity_1"),
                IdentitySocket.Input("identity_2"),
                io.Combo.Input("mode", options=list(MODES), default="mix"),
                io.Float.Input("weight", default=0.5, min=0.0, max=1.0, step=0.05),
            ],
            outputs=[IdentitySocket.Output("combined", display_name="identity")],
        )

    @classmethod
    def execute(cls, identity_1: IdEmbedding, identity_2: IdEmbedding, mode: str, weight: float) -> io.NodeOutput:
        return io.NodeOutput(combine(identity_1, identity_2, mode, weight))
