"""Turns a workflow as ComfyUI's editor saves it into the prompt that ComfyUI's server runs, given /object_info.

The editor does this in the browser; here it is done for the demo and the tests. Format: version 0.4 of
https://docs.comfy.org/specs/workflow_json. Subgraphs and frontend-only packs are not covered.
"""

from typing import Any

Workflow = dict[str, Any]
ObjectInfo = dict[str, Any]
Prompt = dict[str, dict[str, Any]]

MUTED, BYPASSED = 2, 4
FRONTEND_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# The editor draws a second widget below these; its value is saved behind theirs.
AFTER_SEED = ("fixed", "increment", "decrement", "randomize")
UPLOADS = ("image_upload", "video_upload", "audio_upload")


class WorkflowError(ValueError):
    """A workflow that does not fit the node definitions it is run with."""


def to_prompt(workflow: Workflow, object_info: ObjectInfo) -> Prompt:
    """The prompt of every node that runs: widget values by name, links as [node id, output]."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONTEND_ONLY or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        inputs = widget_values(node, object_info)
        for slot in node.get("inputs", []):
            if slot.get("link") is None:
                continue
            source = follow(slot["link"], nodes, links)
            if source is None:
                inputs.pop(slot["name"], None)
            elif nodes[source[0]]["type"] == "PrimitiveNode":
                inputs[slot["name"]] = nodes[source[0]]["widgets_values"][0]
            else:
                inputs[slot["name"]] = [str(source[0]), source[1]]
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def follow(link_id: int, nodes: dict, links: dict) -> tuple[int, int] | None:
    """The (node id, output) that really feeds a link: through reroutes and bypassed nodes; None where it ends."""
    _, node_id, slot, *_, link_type = links[link_id]
    node = nodes[node_id]
    if node.get("mode", 0) == MUTED:
        return None
    if node["type"] == "Reroute":
        passed_on = node["inputs"]
    elif node.get("mode", 0) == BYPASSED:
        # An output is fed by the input in the same place if the types agree, else by the first that agrees.
        same_place = node["inputs"][slot : slot + 1]
        passed_on = [entry for entry in (*same_place, *node["inputs"]) if entry["type"] in (link_type, "*")]
    else:
        return node_id, slot
    if not passed_on or passed_on[0].get("link") is None:
        return None
    return follow(passed_on[0]["link"], nodes, links)


def definition(node_type: str, object_info: ObjectInfo) -> dict:
    try:
        return object_info[node_type]
    except KeyError:
        raise WorkflowError(f"ComfyUI has no node {node_type!r}: is its pack installed, and did it load?") from None


def declared_inputs(node_type: str, object_info: ObjectInfo) -> dict[str, tuple[Any, dict]]:
    """Name -> (type, options) in the order of the node's definition; a combo's type is the list or "COMBO"."""
    known = definition(node_type, object_info)["input"]
    entries = {**known.get("required", {}), **known.get("optional", {})}
    return {name: (entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in entries.items()}


def is_widget(kind: Any, options: dict) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def widget_values(node: dict, object_info: ObjectInfo) -> dict[str, Any]:
    """Name -> value for the widgets of one node, whose file only has their values in order."""
    declared = declared_inputs(node["type"], object_info)
    widgets = {name: options for name, (kind, options) in declared.items() if is_widget(kind, options)}
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: value for name, value in saved.items() if name in widgets}
    rest = list(saved)
    values = {}
    for name, options in widgets.items():
        if not rest:
            break
        values[name] = rest.pop(0)
        seed = options.get("control_after_generate", name in ("seed", "noise_seed"))
        upload = any(options.get(key) for key in UPLOADS)
        if rest and ((seed and rest[0] in AFTER_SEED) or (upload and rest[0] == "image")):
            rest.pop(0)
    if rest:
        raise WorkflowError(
            f"{node['type']} (node {node['id']}) has {len(widgets)} widgets, its file has {len(saved)} values: {saved}"
        )
    return values


def misfits(workflow: Workflow, object_info: ObjectInfo) -> list[str]:
    """Every way in which a workflow disagrees with the node definitions or with itself, one line each."""
    found = []
    for node in workflow["nodes"]:
        if node["type"] not in FRONTEND_ONLY:
            label = f"{node['type']} (node {node['id']})"
            found += [f"{label}: {problem}" for problem in node_misfits(node, object_info)]
    return found + link_misfits(workflow)


def link_misfits(workflow: Workflow) -> list[str]:
    """A link stands in three places: in the list of links, at the output it leaves and at the input it enters."""
    found = []
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        for index, slot in enumerate(node.get("inputs", [])):
            link_id = slot.get("link")
            if link_id is not None and (link_id not in links or links[link_id][3:5] != [node["id"], index]):
                found.append(f"node {node['id']}: input {slot['name']} names link {link_id}, which leads elsewhere")
        for index, slot in enumerate(node.get("outputs", [])):
            named, real = (
                slot.get("links") or [],
                [link[0] for link in links.values() if link[1:3] == [node["id"], index]],
            )
            if sorted(named) != sorted(real):
                found.append(f"node {node['id']}: output {slot['name']} names links {named}, it has {real}")
    for link_id, source, source_slot, target, target_slot, kind in links.values():
        if source not in nodes or target not in nodes:
            found.append(f"link {link_id}: leads from or to a node that is not there")
            continue
        for end, slot in (
            ("output", nodes[source]["outputs"][source_slot]),
            ("input", nodes[target]["inputs"][target_slot]),
        ):
            if slot["type"] not in (kind, "*"):
                found.append(f"link {link_id}: is {kind}, its {end} is {slot['type']}")
    return found


def node_misfits(node: dict, object_info: ObjectInfo) -> list[str]:
    try:
        known = definition(node["type"], object_info)
        declared = declared_inputs(node["type"], object_info)
        values = widget_values(node, object_info)
    except WorkflowError as error:
        return [str(error)]
    found = []
    sockets = [slot["name"] for slot in node.get("inputs", []) if "widget" not in slot]
    expected = [name for name, (kind, options) in declared.items() if not is_widget(kind, options)]
    if sockets != expected:
        found.append(f"inputs {sockets}, defined {expected}")
    outputs = [(slot["name"], slot["type"]) for slot in node.get("outputs", [])]
    expected = list(zip(known["output_name"], known["output"], strict=True))
    if outputs != expected:
        found.append(f"outputs {outputs}, defined {expected}")
    for name, (kind, options) in declared.items():
        if is_widget(kind, options) and name not in values:
            found.append(f"no value for {name}")
        elif name in values:
            found += value_misfits(name, values[name], kind, options)
    return found


def value_misfits(name: str, value: Any, kind: Any, options: dict) -> list[str]:
    choices = kind if isinstance(kind, list) else options.get("options")
    if kind == "COMBO" or isinstance(kind, list):
        # File names are the user's own: which of them are there is not for a workflow to say.
        is_file = isinstance(value, str) and "." in value
        return [] if is_file or value in choices else [f"{name} is {value!r}, defined {choices}"]
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]
    if not isinstance(value, types) or (kind != "BOOLEAN" and isinstance(value, bool)):
        return [f"{name} is {value!r}, not of type {kind}"]
    low, high = options.get("min"), options.get("max")
    if kind in ("INT", "FLOAT") and ((low is not None and value < low) or (high is not None and value > high)):
        return [f"{name} is {value}, outside {low} to {high}"]
    return []


def find(prompt: Prompt, class_type: str) -> str:
    """The id of the one node of that type."""
    found = [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise WorkflowError(f"expected one {class_type} in the workflow, found {len(found)}")
    return found[0]


def set_inputs(prompt: Prompt, class_type: str, **values: Any) -> None:
    """Change inputs of the one node of that type; a name that it does not have is an error."""
    inputs = prompt[find(prompt, class_type)]["inputs"]
    unknown = set(values) - set(inputs)
    if unknown:
        raise WorkflowError(f"{class_type} has no input {sorted(unknown)}; it has {sorted(inputs)}")
    inputs.update(values)
