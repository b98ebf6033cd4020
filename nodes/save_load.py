"""The nodes that keep an identity for later."""

from datetime import datetime, timezone
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..models.identities import content_digest, find_identity, load, pack_version, relative_name, save
from ..pulid.errors import PulidError
from ..pulid.identity import IdEmbedding
from . import host
from .checked import checked
from .texts import described
from .types import IdentitySocket

NO_CARD = ""  # no card was uploaded: the file serves


@described
@checked
class PulidSaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_SaveIdentity",
            display_name="PuLID Save Identity",
            category="PuLID",
            inputs=[
                IdentitySocket.Input("identity"),
                io.String.Input("filename_prefix", default="person"),
                io.Combo.Input("save_as", options=["file", "card"], default="file", optional=True),
            ],
            outputs=[IdentitySocket.Output("saved", display_name="identity")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, identity: IdEmbedding, filename_prefix: str, save_as: str = "file") -> io.NodeOutput:
        folder, card = host.saved_identities(), save_as == "card"
        path = save(identity, folder, _expanded(filename_prefix), datetime.now(timezone.utc), pack_version(), card)
        text = f"Saved as {path.relative_to(folder).as_posix()}"
        if card:  # itself, so that whoever queued it can fetch it
            below = path.parent.relative_to(folder.parent).as_posix()
            shown = {"images": [ui.SavedResult(path.name, below, io.FolderType.output)], "text": [text]}
        else:
            shown = _shown(cls, identity, text)
        return io.NodeOutput(identity, ui=shown)


@described
@checked
class PulidLoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_LoadIdentity",
            display_name="PuLID Load Identity",
            category="PuLID",
            inputs=[
                io.Combo.Input("identity_file", options=host.file_names(host.IDENTITIES)),
                io.Combo.Input(
                    "image",
                    options=[NO_CARD, *host.uploaded_pictures()],
                    default=NO_CARD,
                    optional=True,
                    upload=io.UploadType.image,
                ),
            ],
            outputs=[IdentitySocket.Output("loaded", display_name="identity")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, identity_file: str = "", image: str = NO_CARD) -> bool:
        # Taking this over from ComfyUI lets a shared workflow name a file that is not here; find_identity says so.
        return True

    @classmethod
    def fingerprint_inputs(cls, identity_file: str | None, image: str | None = NO_CARD) -> str | None:
        if not isinstance(identity_file, str):  # it comes through a link, and is not there yet
            return None
        try:
            return content_digest(_chosen(identity_file, image))
        except (PulidError, OSError):  # execute says what is wrong
            return None

    @classmethod
    def execute(cls, identity_file: str, image: str = NO_CARD) -> io.NodeOutput:
        stored = load(_chosen(identity_file, image))
        identity = stored.identity
        text = (
            f"PuLID {identity.version}, {len(identity.cond)} x {identity.tokens} ID tokens, "
            f"saved {stored.created:%Y-%m-%d %H:%M} UTC by version {stored.pack}."
        )
        return io.NodeOutput(identity, ui=_shown(cls, identity, text))


def _chosen(identity_file: str, image: str | None) -> Path:
    """The uploaded card if there is one, else the file among the identities."""
    if not image:
        return find_identity(identity_file, host.folders(host.IDENTITIES))
    name, folder = folder_paths.annotated_filepath(image)  # "card.png [output]" names a card there
    return find_identity(name.rstrip(), [Path(folder or folder_paths.get_input_directory())])


def _expanded(prefix: str) -> str:
    """The prefix with ComfyUI's variables filled in. Name by name, since ComfyUI makes the folders of what it fills."""
    temporary = folder_paths.get_temp_directory()
    return "/".join(folder_paths.get_save_image_path(part, temporary)[1] for part in relative_name(prefix).parts)


def _shown(cls: type[io.ComfyNode], identity: IdEmbedding, text: str) -> dict:
    """What the node shows: the text and, where the identity has them, its faces."""
    pictures = {} if identity.preview is None else ui.PreviewImage(identity.preview / 255, cls=cls).as_dict()
    return {**pictures, "text": [text]}
