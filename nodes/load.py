"""The node that loads PuLID."""

from comfy_api.latest import io

from ..models import catalogue
from ..models.checkpoints import load_pulid, load_vision_tower
from ..models.face_analysis import PROVIDERS, InsightFaceAnalyzer, available_providers
from ..models.files import find, find_antelopev2, state_of
from ..pulid.errors import ForeignWeights
from ..pulid.eva import EvaConfig
from . import host
from .sockets import Pulid, PulidSocket


def _choices(published: list[catalogue.WeightFile], found: list[str]) -> list[str]:
    """What is there, then what could be: a name that is not there leads to a message that says where to get it."""
    return list(dict.fromkeys((*found, *(file.name for file in published))))


class PulidLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        pulid_files = _choices([catalogue.V1_1, catalogue.V1], host.file_names("pulid"))
        towers = [name for name in host.file_names(*host.VISION_FOLDERS) if "eva" in name.lower()]
        return io.Schema(
            node_id="PuLID_Loader",
            display_name="Load PuLID (SDXL)",
            category="PuLID",
            description="Loads a PuLID file for SDXL with the networks that find and look at a face.",
            inputs=[
                io.Combo.Input(
                    "pulid_file",
                    options=pulid_files,
                    default=pulid_files[0],
                    tooltip="The PuLID file, in models/pulid. v1.1 suits most SDXL checkpoints, v1 SDXL-Lightning.",
                ),
                io.Combo.Input(
                    "eva_clip",
                    options=_choices([catalogue.EVA_CLIP], towers),
                    tooltip="The EVA02-CLIP-L/14-336 vision tower that looks at the face, in models/clip_vision.",
                ),
                io.Combo.Input(
                    "face_analysis",
                    options=["antelopev2"],
                    tooltip="The InsightFace models that find and recognise a face (non-commercial research only).",
                ),
                io.Combo.Input(
                    "provider",
                    options=["auto", *PROVIDERS],
                    default="auto",
                    tooltip="What runs the InsightFace models. auto takes the fastest that is installed.",
                ),
                io.Combo.Input(
                    "missing_files",
                    options=["stop"],
                    default="stop",
                    tooltip="What to do when a file is not there. stop says which file, and where to get it.",
                ),
            ],
            outputs=[PulidSocket.Output("loaded", display_name="pulid")],
        )

    @classmethod
    def validate_inputs(cls, pulid_file, eva_clip):
        # Taking these two over from ComfyUI lets a shared workflow name a file that is not here; find says what to do.
        return True

    @classmethod
    def execute(cls, pulid_file, eva_clip, face_analysis, provider, missing_files):
        insightface, facexlib = host.folders(host.INSIGHTFACE), host.folders("facexlib")
        paths = find(pulid_file, host.folders("pulid")), find(eva_clip, host.folders(*host.VISION_FOLDERS))
        analyzer = InsightFaceAnalyzer(
            find_antelopev2(insightface),
            find(catalogue.RETINAFACE, facexlib),
            find(catalogue.BISENET, facexlib),
            available_providers(provider),
            host.manage,
        )
        checkpoint = load_pulid(paths[0], host.OPERATIONS)
        tower = load_vision_tower(paths[1], host.OPERATIONS)
        if tower.config != EvaConfig():
            raise ForeignWeights(
                f"{eva_clip} holds {tower.config}, but PuLID's encoders read EVA02-CLIP-L/14-336: {EvaConfig()}."
            )
        return io.NodeOutput(
            Pulid(
                version=checkpoint.version,
                fingerprint=checkpoint.fingerprint,
                widths=checkpoint.projections.widths,
                tower=host.managed(tower),
                encoder=host.managed(checkpoint.encoder),
                projections=host.managed(checkpoint.projections),
                analyzer=analyzer,
                source=(*map(state_of, paths), analyzer.source),
            )
        )
