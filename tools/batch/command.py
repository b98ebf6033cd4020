"""The command: reads graph and table, has Ray do the jobs, says how it goes and what to do next."""

import argparse
import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Any

from ..workflow import Prompt, WorkflowError, to_prompt
from . import BatchError
from .plan import HOSTED, Plan, plan
from .table import Row, cross, read_table

FAILURES_SHOWN = 50


def options(rest: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py batch",
        description="Runs a graph for every row of a table, on all GPUs that Ray has. See docs/many_pictures.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--workflow", type=Path, required=True, metavar="GRAPH.json", help="as saved or exported (API)")
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("--table", type=Path, metavar="JOBS.csv", help="columns title.input or id.input, a row a job")
    table.add_argument(
        "--cross", type=Path, nargs="+", metavar="CSV", help="every row of one with every row of the next"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="pictures and manifest; goes on there")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; else one is started on this machine")
    parser.add_argument("--workers", type=int, metavar="N", help="of them; default: one for each GPU")
    parser.add_argument("--server", action="append", metavar="URL", help="a ComfyUI that runs already; may be repeated")
    parser.add_argument("--base", type=Path, metavar="DIR", help="ComfyUI's --base-directory, if it is not its folder")
    parser.add_argument("--allow-hosted", action="store_true", help="run nodes that cost money: once, never again")
    parser.add_argument("--comfyui-argument", action="append", default=[], metavar="=--lowvram", help="may be repeated")
    return parser.parse_args(rest)


def run(hosts: list[Path], rest: list[str]) -> int:
    """All of it; 0 when every job is done, 1 when some failed. Raises BatchError, KeyboardInterrupt."""
    known = options(rest)
    if not known.server and not hosts:
        raise BatchError("No ComfyUI found. Name its folder with --comfyui, or one that runs with --server.")
    graph = read_graph(known.workflow)
    rows = cross([read_table(path) for path in ([known.table] if known.table else known.cross)])
    types = types_of(graph)
    refuse_paid([name for name in types if name.startswith(HOSTED)], known.allow_hosted)
    made = plan_of(graph, rows, known, hosts) if "nodes" not in graph else None

    if importlib.util.find_spec("ray") is None:
        raise BatchError(f'This needs Ray: {sys.executable} -m pip install "ray[default]"')
    from .session import Session

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with Session(known, hosts[0] if hosts else None) as session:
        try:
            definitions = session.start(types)
            refuse_paid([name for name in types if definitions.get(name, {}).get("api_node")], known.allow_hosted)
            if made is None:
                made = plan_of(converted(graph, definitions), rows, known, hosts)
            return report(session.carry_out(made), made)
        except KeyboardInterrupt:
            print("\nStopping; what is finished stays. The same command goes on where this one was.", file=sys.stderr)
            raise


def read_graph(path: Path) -> dict[str, Any]:
    try:
        graph = json.loads(path.read_bytes())
    except OSError as error:
        raise BatchError(f"The workflow {path} could not be read: {error.strerror}.") from error
    except ValueError as error:
        raise BatchError(f"The workflow {path.name} is not JSON: {error}.") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        return graph
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not graph or not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in nodes):
        raise BatchError(
            f"{path.name} is no ComfyUI workflow. Save one in the editor, or export it with File, Export (API)."
        )
    return graph


def types_of(graph: dict[str, Any]) -> list[str]:
    nodes = (
        [node["type"] for node in graph["nodes"]]
        if "nodes" in graph
        else [node["class_type"] for node in graph.values()]
    )
    return sorted(set(nodes))


def converted(workflow: dict[str, Any], definitions: dict[str, Any]) -> Prompt:
    """The graph of a file that the editor saved."""
    try:
        return to_prompt(workflow, definitions)
    except (WorkflowError, KeyError) as error:
        raise BatchError(
            f"The workflow could not be read as the editor saved it: {error}. Subgraphs and nodes that only the editor "
            "has are not covered: export it with File, Export (API)."
        ) from error


def plan_of(graph: Prompt, rows: list[Row], known: argparse.Namespace, hosts: list[Path]) -> Plan:
    base = known.base or (hosts[0] if hosts and not known.server else None)
    pictures, identities = [known.workflow.resolve().parent], []
    if base:
        pictures.append(base / "input")
        identities += [base / "output" / "pulid_identities", base / "models" / "pulid_identities"]
    name = (known.table or known.cross[0]).name
    made = plan(graph, rows, {"image": pictures, "identity_file": identities}, name)
    for row, first in made.twins:
        print(f"Row {row} asks for the same as row {first}: made once.", file=sys.stderr)
    return made


def refuse_paid(titles: list[str], allowed: bool) -> None:
    if titles and not allowed:
        raise BatchError(
            f"The graph has nodes that cost money: {', '.join(titles)}. With --allow-hosted each row is sent once and "
            "never again, whatever happens to it."
        )


def report(entries: list[dict[str, Any]], made: Plan) -> int:
    failed = [entry for entry in entries if entry["error"]]
    for entry in failed[:FAILURES_SHOWN]:
        print(f"  row {entry['row']} failed: {entry['error']}")
    if len(failed) > FAILURES_SHOWN:
        print(f"  and {len(failed) - FAILURES_SHOWN} more; manifest.jsonl has them all")
    print(f"{len(made.jobs) - len(failed)} of {len(made.jobs)} jobs are done.")
    if failed:
        print("The same command tries the others again, unless they cost money.")
    return int(bool(failed))
