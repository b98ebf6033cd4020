"""What of the catalogue is there: where, whether it is whole, and what is still to be fetched."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .catalogue import ANTELOPEV2, ANTELOPEV2_ZIP, CATALOGUE, NEEDS, Need, WeightFile
from .locate import ModelFolders, fault_of, shown


@dataclass(frozen=True)
class Entry:
    """A file of the catalogue, where it lies, and what is wrong with it as far as that was looked at."""

    file: WeightFile
    path: Path | None = None
    fault: str | None = None
    hashed: bool = False

    @property
    def whole(self) -> bool:
        return self.path is not None and self.fault is None

    @property
    def verdict(self) -> str:
        if self.path is None:
            return "not here"
        if self.fault:
            return f"ALTERED: {self.fault}"
        if self.hashed and self.file.sha256:
            return "hash right"
        return "size right" if self.file.size else "nothing to check by"


def inventory(
    folders: ModelFolders,
    progress: Callable[[WeightFile, int], None] | None = None,
    files: Iterable[WeightFile] = CATALOGUE,
) -> list[Entry]:
    """An entry for every file. With `progress`, which hears the bytes read, hashes are compared; else sizes alone."""
    return [_entry(file, folders.locate(file), progress) for file in files]


def lacking(entries: Iterable[Entry], needs: Iterable[Need] = NEEDS) -> list[WeightFile]:
    """What has to be fetched before the loader can run."""
    whole = {entry.file for entry in entries if entry.whole}
    zipped = ANTELOPEV2_ZIP in whole
    wanted = [need.files[0] for need in needs if not whole.intersection(need.files)]
    return [file for file in wanted if not (zipped and file.folders == ANTELOPEV2)]


def table(entries: Sequence[Entry]) -> str:
    """One paragraph for each file: what it is, where it lies or comes from, and whether it is whole."""
    rows = [("file", "size", "state", "needed by", "licence"), *map(_cells, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    paragraphs = ("\n    ".join((line, *_below(entry))) for line, entry in zip(lines[1:], entries, strict=True))
    return "\n".join((lines[0], *paragraphs))


INPUTS = {file.name: f"PuLID_Loader: {need.input}" for need in NEEDS for file in need.files}


def _cells(entry: Entry) -> tuple[str, ...]:
    size = entry.path.stat().st_size if entry.path else entry.file.size
    needed = INPUTS.get(entry.file.name, "in place of the two of antelopev2")
    state = entry.verdict.partition(":")[0]
    return entry.file.name, f"{size / 1e6:.0f} MB" if size else "", state, needed, entry.file.licence


def _below(entry: Entry) -> Iterator[str]:
    yield shown(entry.path) if entry.path else entry.file.url
    if not entry.file.sha256:
        yield f"checked by {entry.file.checked_by}"
    if entry.fault:
        yield f"{entry.fault}: delete it, or let --download replace it"


def _entry(file: WeightFile, path: Path | None, progress: Callable[[WeightFile, int], None] | None) -> Entry:
    if path is None:
        return Entry(file)
    if progress is not None:
        return Entry(file, path, fault_of(file, path, lambda done: progress(file, done)), hashed=True)
    size = path.stat().st_size
    return Entry(file, path, f"{size} bytes instead of {file.size}" if file.size not in (None, size) else None)
