"""The nodes that keep an identity for later."""

from datetime import datetime, timezone

import folder_paths
from comfy_api.latest import io, ui

from ..models.identities import content_digest, find_identity, load, pack_version, relative_name, save
from ..pulid.errors import PulidError
from ..pulid.identity import IdEmbedding
from . import host
from .texts import described
from .types import IdentitySocket


@described
class PulidSaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_SaveIdentity",
            display_name="PuLID Save Identity",
            category="PuLID",
            inputs=[IdentitySocket.Input("identity"), io.String.Input("filename_prefix", default="person")],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, identity: IdEmbedding, filename_prefix: str) -> io.NodeOutput:
        folder = host.saved_identities()
        path = save(identity, folder, _expanded(filename_prefix), datetime.now(timezone.utc), pack_version())
        return io.NodeOutput(ui=_shown(cls, identity, f"Saved as {path.relative_to(folder).as_posix()}"))


@described
class PulidLoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_LoadIdentity",
            display_name="PuLID Load Identity",
            category="PuLID",
            inputs=[io.Combo.Input("identity_file", options=host.file_names(host.IDENTITIES))],
            outputs=[IdentitySocket.Output("loaded", display_name="identity")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, identity_file: str) -> bool:
        # Taking this over from ComfyUI lets a shared workflow name a file that is not here; find_identity says so.
        return True

    @classmethod
    def fingerprint_inputs(cls, identity_file: str) -> str | None:
        try:
            return content_digest(find_identity(identity_file, host.folders(host.IDENTITIES)))
        except (PulidError, OSError):  # execute says what is wrong
            return None

    @classmethod
    def execute(cls, identity_file: str) -> io.NodeOutput:
        stored = load(find_identity(identity_file, host.folders(host.IDENTITIES)))
        identity = stored.identity
        text = (
            f"PuLID {identity.version}, {len(identity.cond)} x {identity.tokens} ID tokens, "
            f"saved {stored.created:%Y-%m-%d %H:%M} UTC by version {stored.pack}."
        )
        return io.NodeOutput(identity, ui=_shown(cls, identity, text))


def _expanded(prefix: str) -> str:
    """The prefix with ComfyUI's variables filled in. Name by name, since ComfyUI makes the folders of what it fills."""
    temporary = folder_paths.get_temp_directory()
    return "/".join(folder_paths.get_save_image_path(part, temporary)[1] for part in relative_name(prefix).parts)


def _shown(cls: type[io.ComfyNode], identity: IdEmbedding, text: str) -> dict:
    """What the node shows: the text and, where the identity has them, its faces."""
    pictures = {} if identity.preview is None else ui.PreviewImage(identity.preview / 255, cls=cls).as_dict()
    return {**pictures, "text": [text]}
