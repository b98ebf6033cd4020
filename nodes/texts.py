"""What nodes say of themselves and of their inputs and outputs: in locales/, English like every other language."""

import json
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

from comfy_api.latest import io

ENGLISH = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"


def described(schema: io.Schema) -> io.Schema:
    """The schema with its description, and the tooltips of its inputs and outputs, which are shared between nodes."""
    texts = _english()[schema.node_id]
    schema.description = texts["description"]
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
