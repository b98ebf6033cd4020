"""Jobs of a graph and a table's rows: which input a column names, what each cell means, what is encoded first.

A job's id is a hash of its graph and inputs, files by their content, so that a job keeps its id wherever it stands in
the table. Where the graph encodes photographs, each person is encoded once: that is a task of its own, whose answer is
an identity card, and the jobs load it in place of encoding.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..workflow import Prompt
from . import BatchError
from .table import Row, refuse

ENCODE, SAVE_IDENTITY, LOAD_IDENTITY = "PuLID_Encode", "PuLID_SaveIdentity", "PuLID_LoadIdentity"
PREVIEWS = {"PreviewImage", "PreviewAny", "MaskPreview"}  # shown to nobody here
HOSTED = "PuLID_Hosted"  # how the ids of nodes that cost money begin
# Inputs whose values are names of files -> where a server looks for them, and where the file is put.
FILE_INPUTS = {"image": ("input", "pulid_batch"), "identity_file": ("output", "pulid_identities/pulid_batch")}
SEED = re.compile(r"(^|_)seed$")
WHOLE = re.compile(
    rf"{SEED.pattern}|^(steps|width|height|batch_size|face_index)$"
)  # ComfyUI cuts decimals off in silence
YES, NO = ("true", "yes", "1"), ("false", "no", "0")

Place = tuple[str, str]  # node id, input name


@dataclass(frozen=True)
class Job:
    """One row. `files` are the values that name files, by content; `people` has an encoding for each Encode node."""

    id: str
    row: str
    values: Mapping[Place, Any]
    files: Mapping[Place, str]
    people: Mapping[str, str] = field(default_factory=dict)  # id of the Encode node -> id of the encoding


@dataclass(frozen=True)
class Plan:
    """Everything to do.

    graph      what is common to all jobs
    second     the same, loading cards in place of encoding
    jobs       in the order of the table, each once; twins are rows that ask for the same as one before them
    encodings  id -> a job of the first phase and the Encode node that it is for
    paths      name of a file by its content -> where it lies on this machine
    """

    graph: Prompt
    second: Prompt
    jobs: list[Job]
    twins: list[tuple[str, str]]
    encodings: dict[str, tuple[Job, str]]
    paths: dict[str, Path]

    def graph_of(self, job: Job) -> Prompt:
        """What the server runs for this job in the second phase; the cards are named by their encodings."""
        graph = filled(self.second, {**job.values, **job.files})
        for node_id, encoding in job.people.items():
            graph[node_id]["inputs"]["image"] = card_name(encoding)
        return graph

    def files_of(self, job: Job) -> dict[Place, str]:
        """The names of files in `graph_of`."""
        own = {place: name for place, name in job.files.items() if place[0] in self.second}
        own = {place: name for place, name in own.items() if place[0] not in job.people}
        return own | {(node_id, "image"): card_name(encoding) for node_id, encoding in job.people.items()}

    def encoding_graph(self, encoding: str) -> Prompt:
        """What the server runs to encode a person: all that Encode needs, then Save Identity as a card."""
        job, node_id = self.encodings[encoding]
        needed = ancestors(self.graph, node_id)
        graph = filled({each: self.graph[each] for each in needed}, {**job.values, **job.files})
        saved = {"identity": [node_id, 0], "filename_prefix": f"pulid_batch/{encoding}", "save_as": "card"}
        return {**graph, "card": {"class_type": SAVE_IDENTITY, "inputs": saved}}

    def encoding_files(self, encoding: str) -> dict[Place, str]:
        job, node_id = self.encodings[encoding]
        needed = ancestors(self.graph, node_id)
        return {place: name for place, name in job.files.items() if place[0] in needed}


def card_name(encoding: str) -> str:
    return f"{encoding}.png"


def plan(graph: Prompt, rows: list[Row], own_folders: Mapping[str, list[Path]], table: str = "The table") -> Plan:
    """Jobs for all rows. Raises BatchError, naming rows, before anything is done.

    own_folders  where files lie that the graph names itself, by input: what is found there travels with the jobs;
                 what is not is left to the server
    """
    graph = without_previews(graph)
    places = {column: place_of(column, graph) for column in rows[0].cells}
    read = Reader(graph)
    own = read.own_files(own_folders)
    encodes = [node_id for node_id in graph if is_first_phase(graph, node_id)]
    closures = {node_id: ancestors(graph, node_id) for node_id in encodes}
    second = loading_cards(graph, encodes)

    jobs: dict[str, Job] = {}
    encodings: dict[str, tuple[Job, str]] = {}
    twins, faults = [], []
    for row in rows:
        values, files = {}, dict(own)
        for column, text in row.cells.items():
            place = places[column]
            try:
                if place[1] in FILE_INPUTS:
                    files[place] = read.file(text, row.folders[column])
                else:
                    values[place] = read.value(text, place)
            except ValueError as fault:
                faults.append(f"row {row.label}, {column}: {fault}")
        whole = filled(graph, {**values, **files})
        people = {each: digest({"of": each, **{node: whole[node] for node in closures[each]}}) for each in encodes}
        job = Job(digest(whole), row.label, values, files, people)
        if job.id in jobs:
            twins.append((row.label, jobs[job.id].row))
            continue
        jobs[job.id] = job
        for node_id, encoding in people.items():
            encodings.setdefault(encoding, (job, node_id))
    refuse(table, faults)
    return Plan(graph, second, [*jobs.values()], twins, encodings, read.paths)


# ---- The graph ----


def title_of(node: Mapping[str, Any]) -> str:
    return node.get("_meta", {}).get("title") or node["class_type"]


def links_of(node: Mapping[str, Any]) -> list[tuple[str, int]]:
    values = node["inputs"].values()
    return [(str(value[0]), value[1]) for value in values if is_link(value)]


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and not isinstance(value[0], list)


def ancestors(graph: Prompt, node_id: str) -> set[str]:
    """The node and all that it needs."""
    found, waiting = set(), [node_id]
    while waiting:
        node = waiting.pop()
        if node not in found and node in graph:
            found.add(node)
            waiting += [source for source, _ in links_of(graph[node])]
    return found


def filled(graph: Prompt, values: Mapping[Place, Any]) -> Prompt:
    """A copy with these values, as far as it has their nodes."""
    copied = {node_id: {**node, "inputs": {**node["inputs"]}} for node_id, node in graph.items()}
    for (node_id, name), value in values.items():
        if node_id in copied:
            copied[node_id]["inputs"][name] = value
    return copied


def digest(graph: Mapping[str, Any]) -> str:
    """A hash of what runs: titles and the order of names count for nothing."""
    said = {key: node if isinstance(node, str) else [node["class_type"], node["inputs"]] for key, node in graph.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


def without_previews(graph: Prompt) -> Prompt:
    read = {source for node in graph.values() for source, _ in links_of(node)}
    return {key: node for key, node in graph.items() if node["class_type"] not in PREVIEWS or key in read}


def is_first_phase(graph: Prompt, node_id: str) -> bool:
    """An Encode node of whose outputs only the identity is used, and that needs no other one and nothing paid."""
    if graph[node_id]["class_type"] != ENCODE:
        return False
    used = {output for node in graph.values() for source, output in links_of(node) if source == node_id}
    needed = ancestors(graph, node_id) - {node_id}
    return used == {0} and not any(graph[each]["class_type"].startswith((ENCODE, HOSTED)) for each in needed)


def loading_cards(graph: Prompt, encodes: Iterable[str]) -> Prompt:
    """The graph with Load Identity in the place of each of these, without what nothing needs any more."""
    needed = set().union(*(ancestors(graph, node_id) for node_id in encodes))
    second = dict(graph)
    for node_id in encodes:
        loads = {"class_type": LOAD_IDENTITY, "inputs": {"identity_file": "", "image": ""}}
        second[node_id] = {**loads, "_meta": {"title": title_of(graph[node_id])}}
    while True:
        read = {source for node in second.values() for source, _ in links_of(node)}
        useless = [key for key in second if key in needed and key not in read and key not in encodes]
        if not useless:
            return second
        for key in useless:
            del second[key]


def seed_of(made: Plan, job: Job) -> Any:
    """The seed of the job's only node that has one; of several, by node id."""
    graph = filled(made.graph, job.values)
    found = {
        node_id: value
        for node_id, node in graph.items()
        for name, value in node["inputs"].items()
        if SEED.search(name) and not isinstance(value, list)
    }
    return found if len(set(found.values())) > 1 else next(iter(found.values()), None)


# ---- Columns and cells ----


def place_of(column: str, graph: Prompt) -> Place:
    """The input that a column names, as title.input or id.input. Raises BatchError for none, several, or a link."""
    name, dot, wanted = column.rpartition(".")
    found = [node_id for node_id, node in graph.items() if dot and name in (node_id, title_of(node))]
    if not found:
        known = ", ".join(f"{title_of(node)} ({node_id})" for node_id, node in graph.items())
        raise BatchError(f"Column {column!r}, row 1: the graph has no node {name!r}. Its nodes are: {known}.")
    if len(found) > 1:
        choices = " or ".join(f"{node_id}.{wanted}" for node_id in found)
        raise BatchError(
            f"Column {column!r}, row 1: {len(found)} nodes are called {name!r}. Name one by id: {choices}."
        )
    inputs = graph[found[0]]["inputs"]
    if wanted not in inputs:
        known = ", ".join(key for key, value in inputs.items() if not is_link(value))
        raise BatchError(f"Column {column!r}, row 1: {name!r} has no input {wanted!r}. It has: {known}.")
    if is_link(inputs[wanted]):
        source = title_of(graph[str(inputs[wanted][0])])
        raise BatchError(
            f"Column {column!r}, row 1: that input is connected to {source!r}. Name an input of that node."
        )
    return found[0], wanted


class Reader:
    """Makes values of cells; hashes each file once."""

    def __init__(self, graph: Prompt):
        self.graph = graph
        self.paths: dict[str, Path] = {}
        self.names: dict[Path, str] = {}

    def own_files(self, folders: Mapping[str, list[Path]]) -> dict[Place, str]:
        found = {}
        for node_id, node in self.graph.items():
            for name, value in node["inputs"].items():
                candidates = [folder / value for folder in folders.get(name, ()) if isinstance(value, str) and value]
                if here := [path for path in candidates if is_file(path)]:
                    found[node_id, name] = self.named(here[0])
        return found

    def file(self, text: str, folder: Path) -> str:
        path = folder / text
        if not text or not is_file(path):
            raise ValueError(f"there is no file {text!r} in {folder.name}/; paths are relative to the table")
        return self.named(path)

    def named(self, path: Path) -> str:
        path = path.resolve()
        if path not in self.names:
            try:
                content = hashlib.sha256(path.read_bytes())
            except OSError as error:
                raise ValueError(f"{path.name} could not be read: {error.strerror}") from error
            self.names[path] = content.hexdigest()[:32] + path.suffix.lower()
            self.paths.setdefault(self.names[path], path)
        return self.names[path]

    def value(self, text: str, place: Place) -> Any:
        """The cell as the type that the graph has in that place. Raises ValueError in words."""
        present = self.graph[place[0]]["inputs"][place[1]]
        if isinstance(present, bool):
            if text.strip().lower() not in (*YES, *NO):
                raise ValueError(f"expected true or false, found {text!r}")
            return text.strip().lower() in YES
        if isinstance(present, (int, float)):
            return number(text, whole=bool(WHOLE.search(place[1])))
        if isinstance(present, str):
            return text
        raise ValueError(
            f"the graph has {type(present).__name__} there, and a cell is a text, a number or true or false"
        )


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text too long for a name, or one that cannot be a name
        return False


def number(text: str, whole: bool) -> int | float:
    try:
        return int(text)
    except ValueError:
        if whole:
            raise ValueError(f"expected a whole number, found {text!r}") from None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"expected a number, found {text!r}")
    return found
