"""What nodes say of themselves and of their inputs and outputs: in locales/, English like every other language."""

import json
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from comfy_api.latest import io

Node = TypeVar("Node", bound=io.ComfyNode)
# What people look for, in ComfyUI's search of nodes from 0.11 on; what they used before is among it. Those who do not
# know this pack yet are led to the nodes that a graph begins with. Nobody is led here for swapping faces: it makes new
# pictures.
NEWCOMERS = ["face", "identity", "portrait", "person", "likeness", "consistent character"]
NEWCOMERS += ["faceid", "face id", "ipadapter", "ip adapter", "instantid"]
HOSTED = ["fal", "cloud", "without gpu"]
ALIASES = {
    "PuLID_Loader": [*NEWCOMERS, "insightface", "antelopev2", "eva clip"],
    "PuLID_Encode": [*NEWCOMERS, "photo", "face embedding"],
    "PuLID_Apply": [*NEWCOMERS],
    "PuLID_ApplyAdvanced": [*NEWCOMERS, "ortho", "weight curve"],
    "PuLID_PhotoList": ["batch images", "image list", "several photos"],
    "PuLID_BestPhotos": ["face", "choose photos", "sort photos"],
    "PuLID_LikenessGate": ["face", "filter pictures", "score"],
    "PuLID_FaceSimilarity": ["face", "likeness", "compare faces", "score"],
    "PuLID_PlacePeople": ["face", "two people", "regional", "mask"],
    "PuLID_ApplyPeople": ["face", "likeness", "two people", "regional"],
    "PuLID_FaceCrop": ["detailer", "close up", "inpaint face"],
    "PuLID_FacePaste": ["detailer", "uncrop", "stitch"],
    "PuLID_CombineIdentities": ["face", "mix people", "blend faces", "merge identities"],
    "PuLID_SaveIdentity": ["face", "person", "identity file", "identity card"],
    "PuLID_LoadIdentity": ["face", "person", "identity file", "identity card"],
    "PuLID_Hosted": [*NEWCOMERS, *HOSTED],
    "PuLID_HostedSubmit": [*HOSTED, "queue"],
    "PuLID_HostedStatus": [*HOSTED, "progress"],
    "PuLID_HostedResult": [*HOSTED, "fetch pictures"],
    "PuLID_HostedCancel": [*HOSTED, "stop request"],
    "PuLID_HostedUpload": [*HOSTED, "send photos"],
    "PuLID_HostedRequests": [*HOSTED, "history", "journal"],
}
ENGLISH = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"


def described(node: type[Node]) -> type[Node]:
    """A class decorator: gives the node's schema its description, and its inputs and outputs their tooltips."""
    define_schema = node.define_schema
    node.define_schema = classmethod(lambda cls: _with_texts(define_schema()))
    return node


def _with_texts(schema: io.Schema) -> io.Schema:
    """Inputs and outputs are shared between nodes, so they are copied."""
    texts = _english()[schema.node_id]
    schema.description = texts["description"]
    if hasattr(schema, "search_aliases"):
        schema.search_aliases = ALIASES.get(schema.node_id, [])
    schema.inputs = [_with_tooltip(one, texts["inputs"][one.id]) for one in schema.inputs]
    schema.outputs = [_with_tooltip(one, texts["outputs"][str(index)]) for index, one in enumerate(schema.outputs)]
    return schema


def _with_tooltip(slot: io.Input | io.Output, texts: dict[str, str]) -> io.Input | io.Output:
    slot = copy(slot)
    slot.tooltip = texts.get("tooltip")
    return slot


@cache
def _english() -> dict[str, Any]:
    return json.loads(ENGLISH.read_text(encoding="utf-8"))
