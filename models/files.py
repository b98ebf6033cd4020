"""Finds weight files in folders that somebody else names, and says where to get the ones that are not there."""

from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from ..pulid.errors import InputError, MissingWeights
from .catalogue import ANTELOPEV2_ZIP, BY_NAME, GLINTR100, SCRFD, WeightFile

# Where people and programs put antelopev2, below an InsightFace folder. The published zip holds a folder of its own
# name, so unpacking it where the files belong nests it once more.
ANTELOPEV2_PLACES = (
    "models/antelopev2",
    "antelopev2",
    "models/antelopev2/antelopev2",
    "antelopev2/antelopev2",
)


def find(file: WeightFile | str, folders: Iterable[Path | str]) -> Path:
    """The first of `folders` that holds the file decides.

    file     a record of the catalogue, or a name as a list of files gives it; either kind of slash will do, since
             workflows travel between systems
    folders  the folders that may hold it, in order

    Raises MissingWeights when none does, InputError when the name leads out of the folders.
    """
    folders = [Path(folder) for folder in folders]
    name = file if isinstance(file, str) else file.name
    relative = PureWindowsPath(name)  # reads both kinds of slash, on every system
    if relative.anchor or ".." in relative.parts:
        raise InputError(f"Expected a file name inside the model folders, found {name!r}. Choose a file from the list.")
    for folder in folders:
        if (candidate := folder.joinpath(*relative.parts)).is_file():
            return candidate
    raise MissingWeights(_missing(name, BY_NAME.get(relative.name), folders))


def find_antelopev2(folders: Iterable[Path | str]) -> Path:
    """The folder that directly holds antelopev2's detector and recogniser, nested or not.

    folders  InsightFace folders (`models/insightface` and its like), in order

    Raises MissingWeights when no place holds both files.
    """
    folders = [Path(folder) for folder in folders]
    places = [folder / place for folder in folders for place in ANTELOPEV2_PLACES]
    for place in places:
        if all((place / file.name).is_file() for file in (SCRFD, GLINTR100)):
            return place
    target = places[0] if places else Path("models", SCRFD.folders[0])
    raise MissingWeights(
        f"Expected {SCRFD.name} and {GLINTR100.name} together in a folder antelopev2, found no such folder. "
        f"Looked in: {_listed(places)}. "
        f"Download {ANTELOPEV2_ZIP.url} and unpack it so that the files lie in {target}. "
        f"Licence: {ANTELOPEV2_ZIP.licence}."
    )


def _missing(name: str, record: WeightFile | None, folders: list[Path]) -> str:
    """What to tell somebody whose file is in none of the folders."""
    if record is None:
        target = folders[0] if folders else Path("models")
        return f"{name} was not found. Looked in: {_listed(folders)}. Put it in {target}, or choose another file."
    target = folders[0] if folders else Path("models", record.folders[0])
    return (
        f"{name} ({record.needed_for}) was not found. Looked in: {_listed(folders)}. "
        f"Download it from {record.url} and put it at {target / record.name}. Licence: {record.licence}."
    )


def _listed(folders: list[Path]) -> str:
    return ", ".join(map(str, folders)) or "no folder (none is configured)"


def state_of(file: Path) -> tuple[str, int, int]:
    """Tells a file from the same one changed: its path, size in bytes and time of change."""
    about = file.stat()
    return str(file), about.st_size, about.st_mtime_ns
