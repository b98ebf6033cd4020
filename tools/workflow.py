"""Turns a workflow as ComfyUI's editor saves it into the prompt that ComfyUI's server runs, given /object_info.

The editor does this in the browser; here it is done for the demo and the tests. Format: version 0.4 of
https://docs.comfy.org/specs/workflow_json. Subgraphs and frontend-only packs are not covered.
"""

from typing import Any

Workflow = dict[str, Any]
Node = dict[str, Any]  # of a workflow
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


def follow(link_id: int, nodes: dict[int, Node], links: dict[int, list[Any]]) -> tuple[int, int] | None:
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


def declared_inputs(node_type: str, object_info: ObjectInfo) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (type, options) in the order of the node's definition; a combo's type is the list or "COMBO"."""
    if node_type not in object_info:
        raise WorkflowError(f"ComfyUI has no node {node_type!r}: is its pack installed, and did it load?")
    known = object_info[node_type]["input"]
    entries = {**known.get("required", {}), **known.get("optional", {})}
    return {name: (entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in entries.items()}


def widgets_of(declared: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Name -> options of the inputs that the editor draws as widgets."""
    return {
        name: options
        for name, (kind, options) in declared.items()
        if (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")
    }


def widget_values(node: Node, object_info: ObjectInfo) -> dict[str, Any]:
    """Name -> value for the widgets of one node, whose file only has their values in order."""
    widgets = widgets_of(declared_inputs(node["type"], object_info))
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
    """Where a workflow disagrees with the nodes' definitions or with itself, one line each; values are the server's."""
    found = []
    for node in workflow["nodes"]:
        if node["type"] not in FRONTEND_ONLY:
            label = f"{node['type']} (node {node['id']})"
            found += [f"{label}: {problem}" for problem in node_misfits(node, object_info)]
    return found + link_misfits(workflow)


def node_misfits(node: Node, object_info: ObjectInfo) -> list[str]:
    """Links are saved by position, so names, types and order of what is linked have to agree."""
    try:
        declared = declared_inputs(node["type"], object_info)
        lacking = [name for name in widgets_of(declared) if name not in widget_values(node, object_info)]
    except WorkflowError as error:
        return [str(error)]
    found = [f"no value for {name}" for name in lacking]
    inputs = [slot["name"] for slot in node.get("inputs", []) if "widget" not in slot]
    sockets = [name for name in declared if name not in widgets_of(declared)]
    if inputs != sockets:
        found.append(f"inputs {inputs}, defined {sockets}")
    known = object_info[node["type"]]
    outputs = [(slot["name"], slot["type"]) for slot in node.get("outputs", [])]
    expected = [*zip(known["output_name"], known["output"], strict=True)]
    fits = outputs == expected[: len(outputs)]  # a newer ComfyUI may have added some behind them
    return found if fits else [*found, f"outputs {outputs}, defined {expected}"]


def link_misfits(workflow: Workflow) -> list[str]:
    """A link stands in three places: in the list of links, at the output it leaves and at the input it enters."""
    listed = {("output", *link[:3]) for link in workflow["links"]}
    listed |= {("input", link[0], *link[3:5]) for link in workflow["links"]}
    drawn = set()
    for node in workflow["nodes"]:
        for index, slot in enumerate(node.get("inputs", [])):
            drawn |= {("input", slot["link"], node["id"], index)} if slot.get("link") is not None else set()
        for index, slot in enumerate(node.get("outputs", [])):
            drawn |= {("output", link, node["id"], index) for link in slot.get("links") or []}
    return [
        f"link {link}: is not at {end} {index} of node {node} and in the list"
        for end, link, node, index in sorted(listed ^ drawn)
    ]


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
