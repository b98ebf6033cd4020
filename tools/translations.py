"""The texts of locales/: what nodes say in English (nodes/texts.py), and its translations.

ComfyUI serves locales/*/nodeDefs.json to its editor, which looks a text up as nodeDefs.<node>.inputs.<name>.tooltip
and shows the schema's own where a language has none (https://docs.comfy.org/custom-nodes/i18n). The options of a combo
are values in saved workflows, and the editor translates none. Nodes of older workflows stay English.
"""

import json
from collections.abc import Iterator
from typing import Any

from . import ROOT

LOCALES = ROOT / "locales"
ENGLISH = LOCALES / "en" / "nodeDefs.json"

Texts = dict[str, Any]  # node id -> its texts, as in the files


def english(object_info: dict[str, Any]) -> Texts:
    """The texts of nodes as ComfyUI's /object_info describes them."""
    return {name: node_texts(node) for name, node in sorted(object_info.items())}


def node_texts(node: dict[str, Any]) -> Texts:
    declared = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name: slot_texts(name, options.get("tooltip")) for name, (_, options) in declared.items()},
        "outputs": {str(index): slot_texts(*output) for index, output in enumerate(outputs)},
    }


def slot_texts(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def read(language: str) -> Texts:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def flat(texts: Texts, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text after its path, such as ("PuLID_Apply", "inputs", "weight", "tooltip")."""
    for key, value in texts.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, key))
        else:
            yield (*path, key), value
