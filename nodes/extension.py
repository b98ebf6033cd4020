"""The list of nodes, asked for once when ComfyUI starts."""

from comfy_api.latest import ComfyExtension, io

from . import host, legacy
from .apply import PulidApply, PulidApplyAdvanced
from .closeup import PulidFaceCrop, PulidFacePaste
from .combine import PulidCombineIdentities
from .encode import PulidEncode
from .hosted import NODES as HOSTED
from .lists import PulidPhotoList
from .load import PulidLoader
from .people import PulidApplyPeople, PulidBestPhotos, PulidLikenessGate, PulidPlacePeople
from .save_load import PulidLoadIdentity, PulidSaveIdentity
from .similarity import PulidFaceSimilarity


class PulidExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host.register_folders()
        host.learn_users()
        return [
            PulidLoader,
            PulidEncode,
            PulidPhotoList,
            PulidCombineIdentities,
            PulidSaveIdentity,
            PulidLoadIdentity,
            PulidApply,
            PulidApplyAdvanced,
            PulidFaceSimilarity,
            PulidBestPhotos,
            PulidLikenessGate,
            PulidPlacePeople,
            PulidApplyPeople,
            PulidFaceCrop,
            PulidFacePaste,
            *HOSTED,
            *legacy.not_taken(),
        ]
