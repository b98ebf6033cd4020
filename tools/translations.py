"""Writes locales/en/nodeDefs.json, the English of the nodes' own schemas, which every translation follows.

    .venv/bin/python tools/translations.py COMFYUI

ComfyUI serves locales/*/nodeDefs.json to its editor, which looks a text up as nodeDefs.<node>.inputs.<name>.tooltip
and shows the schema's own where a language has none (https://docs.comfy.org/custom-nodes/i18n). The options of a combo
are values in saved workflows, and the editor translates none. Deprecated nodes are left out: they stay English.
"""

import asyncio
import json
import sys
from collections.abc import Iterator

from . import ROOT

LOCALES = ROOT / "locales"
ENGLISH = LOCALES / "en" / "nodeDefs.json"

Texts = dict[str, dict]  # node id -> its texts, as in the files


def english(object_info: dict[str, dict]) -> Texts:
    """The texts of nodes as ComfyUI's /object_info describes them."""
    return {name: node_texts(node) for name, node in sorted(object_info.items()) if not node["deprecated"]}


def node_texts(node: dict) -> dict:
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


def described_nodes(comfyui: str) -> dict[str, dict]:
    """This pack's part of /object_info, without a server."""
    from . import comfy_host  # and with it torch, which nothing else here needs

    comfy_host.enter(comfyui)
    import pulid_sdxl

    async def nodes() -> list:
        extension = await pulid_sdxl.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.define_schema().node_id: node.GET_NODE_INFO_V1() for node in asyncio.run(nodes())}


if __name__ == "__main__":
    before = dict(flat(read("en"))) if ENGLISH.is_file() else {}
    after = english(described_nodes(sys.argv[1]))
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(after, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for path, text in flat(after):
        if before.get(path) != text:
            print(f"to translate: {'.'.join(path)}: {text}")
