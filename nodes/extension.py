"""The list of nodes, asked for once when ComfyUI starts."""

from comfy_api.latest import ComfyExtension, io

from . import host, legacy
from .apply import PulidApply, PulidApplyAdvanced
from .combine import PulidCombineIdentities
from .encode import PulidEncode
from .hosted import NODES as HOSTED
from .load import PulidLoader
from .save_load import PulidLoadIdentity, PulidSaveIdentity
from .similarity import PulidFaceSimilarity


class PulidExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_folders()
        host.learn_users()
        return [
            PulidLoader,
            PulidEncode,
            PulidCombineIdentities,
            PulidSaveIdentity,
            PulidLoadIdentity,
            PulidApply,
            PulidApplyAdvanced,
            PulidFaceSimilarity,
            *HOSTED,
            *legacy.not_taken(),
        ]
