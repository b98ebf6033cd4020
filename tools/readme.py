"""What README and the workflows say of the weight files, made from the catalogue; tests compare."""

from ..models.catalogue import CATALOGUE, RESEARCH_ONLY, WeightFile


def workflow_hint(file: WeightFile) -> dict[str, str]:
    """What a workflow says of a file in `properties.models`, so that ComfyUI's editor offers to fetch it."""
    hint = {"name": file.name, "url": file.url, "directory": file.folders[0]}
    return hint | ({"hash": file.sha256, "hash_type": "SHA256"} if file.sha256 else {})


def markdown_table() -> str:
    """The table of the README: every file, what it is for, its size, its licence and what a download is checked by."""
    rows = ["| file under `models/` | for | size | licence | checked by |", "|---|---|---|---|---|"]
    for file in CATALOGUE:
        size = f"{file.size / 1e6:.0f} MB" if file.size else ""
        licence = f"**{file.licence}**" if file.licence == RESEARCH_ONLY else file.licence
        rows.append(f"| [`{file.place}`]({file.url}) | {file.needed_for} | {size} | {licence} | {file.checked_by} |")
    return "\n".join(rows)
