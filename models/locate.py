"""Finds weight files in folders that somebody else names, and says where to get the ones that are not there."""

import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath

from ..pulid.errors import DamagedWeights, DownloadError, InputError, MissingWeights
from .catalogue import ANTELOPEV2, ANTELOPEV2_ZIP, BY_NAME, CATALOGUE, GLINTR100, SCRFD, WeightFile

# Where people and programs put antelopev2, below an InsightFace folder. The published zip holds a folder of its own
# name, so unpacking it where the files belong nests it once more.
ANTELOPEV2_PLACES = ("models/antelopev2", "antelopev2", "models/antelopev2/antelopev2", "antelopev2/antelopev2")
ANTELOPEV2_FILES = (SCRFD, GLINTR100)
ZIP_PLACES = ("models", "", *ANTELOPEV2_PLACES[:2])

CHUNK = 4 << 20  # bytes read at once

# What a failed download leaves under the name of a weight file.
NOT_WEIGHTS = (
    (rb"\Z", "is empty"),
    (rb"version https://git-lfs", "is a git-lfs pointer: a note of where the file lies, not the file"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml)", "is a web page, saved under the name of a weight file"),
    (rb"\s*[{\[]", "is text (JSON), perhaps a server's error message, saved under the name of a weight file"),
)


@dataclass(frozen=True)
class ModelFolders:
    """Where weight files may lie. Looking for one never writes anything.

    named      ComfyUI's name of a folder ("pulid", "clip_vision", ...) -> its paths in order; downloads go to the first
    elsewhere  folders of other programs that hold such files directly; searched last, never written to
    """

    named: Mapping[str, Sequence[Path]]
    elsewhere: tuple[Path, ...] = ()

    def of(self, file: WeightFile) -> list[Path]:
        """All paths that may hold the file; for antelopev2 the InsightFace folders, which hold it somewhere below."""
        names = dict.fromkeys(folder.partition("/")[0] for folder in file.folders)
        return list(dict.fromkeys(Path(path) for name in names for path in self.named.get(name, ())))

    def find(self, name: str, like: WeightFile) -> Path:
        """The file of this name in the folders of that record; raises what `find` raises."""
        other = BY_NAME.get(PureWindowsPath(name).name)
        try:
            return find(name, self.of(like), self.elsewhere)
        except MissingWeights as error:
            if other is None or other.folders == like.folders:
                raise
            words = f"{name} belongs to another input ({other.needed_for}). Choose {like.name} here."
            raise MissingWeights(words) from error

    def locate(self, file: WeightFile) -> Path | None:
        """Where the file lies, if it does."""
        return next(filter(os.path.isfile, self._places(file)), None)

    def in_the_way(self, file: WeightFile) -> str | None:
        """What lies in the file's place and is no file, in words; None where nothing does."""
        return next(filter(None, map(in_the_way, self._places(file))), None)

    def _places(self, file: WeightFile) -> Iterator[Path]:
        if file.name == ANTELOPEV2_ZIP.name:
            return (folder / place / file.name for folder in self.of(file) for place in ZIP_PLACES)
        if file.folders == ANTELOPEV2:
            return (place / file.name for place in self._antelopev2(self.elsewhere))
        return _candidates(file.name, file, self.of(file), self.elsewhere)

    def destination(self, file: WeightFile) -> Path:
        """The folder that a download of the file goes to. Raises MissingWeights where none is configured."""
        if file.folders == ANTELOPEV2:
            places = self._antelopev2()
        else:
            places = [folder / file.folders[0].partition("/")[2] for folder in self.of(file)]
        if not places:
            raise MissingWeights(f"No folder {file.folders[0]!r} is configured, so {file.name} cannot be put anywhere.")
        return places[0]

    def _antelopev2(self, elsewhere: Sequence[Path] = ()) -> list[Path]:
        """The folder of antelopev2's two files: the one that holds both, else the one of ours that holds most, or none.

        Half of them here and half there is not antelopev2.
        """
        ours = _antelopev2_places(self.of(SCRFD))

        def held(place: Path) -> int:
            return sum(os.path.isfile(place / file.name) for file in ANTELOPEV2_FILES)

        whole = (place for place in (*ours, *elsewhere) if held(place) == len(ANTELOPEV2_FILES))
        best = next(whole, None) or max(ours, key=held, default=None)
        return [best] if best else []


def find(file: WeightFile | str, folders: Iterable[Path | str], elsewhere: Iterable[Path] = ()) -> Path:
    """The first of `folders` that holds the file decides; for files of the catalogue, `elsewhere` comes after them.

    file     a record of the catalogue, or a name as a list of files gives it; either kind of slash will do, since
             workflows travel between systems
    folders  the folders that may hold it, in order

    Raises MissingWeights when none does, InputError when the name leads out of the folders.
    """
    places = list(map(Path, folders))
    name = file if isinstance(file, str) else file.name
    relative = PureWindowsPath(name)  # reads both kinds of slash, on every system
    if relative.anchor or ".." in relative.parts or not relative.parts:
        raise InputError(f"Expected a file name inside the model folders, found {name!r}. Choose a file from the list.")
    record = BY_NAME.get(relative.name)
    candidates = [*_candidates(Path(*relative.parts), record, places, elsewhere)]
    candidates += [place / relative.name for place in places]  # a folder of another machine, while it lies flat here
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise MissingWeights(next(filter(None, map(in_the_way, candidates)), None) or _missing(name, record, places))


def find_antelopev2(folders: Iterable[Path | str], elsewhere: Iterable[Path] = ()) -> Path:
    """The folder that directly holds antelopev2's detector and recogniser, nested or not.

    folders    InsightFace folders (`models/insightface` and its like), in order
    elsewhere  folders that may hold the files directly, searched last

    Raises MissingWeights when no place holds both files.
    """
    places = _antelopev2_places(map(Path, folders))
    for place in (*places, *elsewhere):
        if all(os.path.isfile(place / file.name) for file in ANTELOPEV2_FILES):
            return place
    target = places[0] if places else Path("models", *ANTELOPEV2)
    raise MissingWeights(
        f"Expected {SCRFD.name} and {GLINTR100.name} together in a folder antelopev2, found no such folder. Looked in: "
        f"{_listed(places)}. Download {ANTELOPEV2_ZIP.url} and put it, or the two files in it, in {shown(target)}. "
        f"Licence: {ANTELOPEV2_ZIP.licence}."
    )


def unpack_antelopev2(
    folders: ModelFolders, files: Sequence[WeightFile] = ANTELOPEV2_FILES, published: WeightFile = ANTELOPEV2_ZIP
) -> None:
    """Unpack the published zip, where somebody put it and its files are not there yet; else do nothing.

    Its hash is compared first, and each file gets its name once it is whole. Raises DamagedWeights for another zip than
    was published, DownloadError where the folder does not take the files.
    """
    missing = [file for file in files if not folders.locate(file)]
    archive = folders.locate(published) if missing else None
    if archive is None:
        return
    if fault := fault_of(published, archive):
        raise DamagedWeights(
            f"{shown(archive)} is not the zip that was published: {fault}. Delete it and get it again from "
            f"{published.url}."
        )
    best, refusals = folders.destination(missing[0]), list[OSError]()
    for target in dict.fromkeys((best, *_antelopev2_places(folders.of(SCRFD)))):
        try:
            return _unpack(archive, files if refusals else missing, target)  # half here and half there serves nobody
        except OSError as error:
            refusals.append(error)
    raise DownloadError(
        f"{shown(archive)} could not be unpacked into {shown(best)} ({refusals[0].strerror}). Check the rights and the "
        "room; or unpack the zip into a folder of your own, named in extra_model_paths.yaml, under insightface."
    ) from refusals[0]


def _unpack(archive: Path, files: Iterable[WeightFile], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=target) as folder, zipfile.ZipFile(archive) as opened:
        entries = {Path(entry).name: entry for entry in opened.namelist()}
        for file in files:
            part = Path(opened.extract(entries[file.name], folder))
            if fault := fault_of(file, part):
                raise DamagedWeights(f"{shown(archive)} holds another {file.name} than was published: {fault}.")
            os.replace(part, target / file.name)


def other_programs(environment: Mapping[str, str], home: Path) -> tuple[Path, ...]:
    """Folders in which other programs keep such files: Hugging Face's cache, InsightFace's home, facexlib's package."""
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    hub = Path(environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or hub).expanduser()
    repositories = dict.fromkeys(copy.repo_id.replace("/", "--") for file in CATALOGUE for copy in file.copies)
    folders = [snapshot for name in repositories for snapshot in _snapshots(hub / f"models--{name}")]
    folders += _antelopev2_places([home / ".insightface"])
    facexlib = find_spec("facexlib")  # finds, does not import
    folders += [Path(place, "weights") for place in (facexlib and facexlib.submodule_search_locations) or ()]
    return tuple(folder for folder in folders if folder.is_dir())


def fault_of(file: WeightFile, path: Path, progress: Callable[[int], None] = lambda done: None) -> str | None:
    """How the file at `path` differs in size or hash from what was published; None if in nothing that is known.

    `progress` hears how many bytes are read.
    """
    size = path.stat().st_size
    if file.size not in (None, size):
        return f"{size} bytes instead of {file.size}"
    if file.sha256 is None:
        return None
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(done)
    found = digest.hexdigest()
    return f"sha256 {found} instead of {file.sha256}" if found != file.sha256 else None


def not_weights(head: bytes) -> str | None:
    """What a file that begins like this is instead of weights; None if that cannot be told."""
    return next((verdict for beginning, verdict in NOT_WEIGHTS if re.match(beginning, head)), None)


def file_state(path: Path) -> tuple[str, int, int]:
    """Path, size in bytes and time of change: another state, another content."""
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns


def shown(path: Path) -> str:
    """The path without the name of the person's home folder."""
    try:
        return str(Path("~", path.relative_to(Path.home())))
    except (ValueError, RuntimeError):  # not below it; nobody's
        return str(path)


def in_the_way(path: Path) -> str | None:
    """What lies at a path where a file should be, and what to do about it; None where nothing does, or a file."""
    name = shown(path)
    if os.path.isdir(path):
        return f"{name} is a folder, where a file should be. Move it away; if it holds the file, put that here."
    try:
        path.open("rb").close()
    except PermissionError as error:
        closed = next(filter(os.path.exists, (path, *path.parents)))
        return f"{shown(closed)}: {error.strerror}. Give the user that ComfyUI runs as the right to read it."
    except (OSError, ValueError):
        if os.path.islink(path):
            return (
                f"{name} is a link that leads nowhere: to {shown(Path(os.readlink(path)))}. Put the file there, or "
                "delete the link and put the file itself in its place."
            )
    return None


def _candidates(
    name: Path | str, record: WeightFile | None, folders: Iterable[Path], elsewhere: Iterable[Path]
) -> Iterator[Path]:
    yield from (folder / name for folder in folders)
    if record:  # other programs keep it under the name it was published by
        names = dict.fromkeys((record.name, *(copy.path for copy in record.copies)))
        yield from (folder / published for folder in elsewhere for published in names)


def _antelopev2_places(folders: Iterable[Path]) -> list[Path]:
    return [folder / place for folder in folders for place in ANTELOPEV2_PLACES]


def _snapshots(repository: Path) -> list[Path]:
    """The versions of a repository in Hugging Face's cache, the one that its `main` names first."""
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    try:
        found = sorted((repository / "snapshots").iterdir())
    except OSError:
        found = []
    return sorted(found, key=lambda path: path.name != main)


FOREIGN_NAME = re.compile(r"flux|krea|chroma|sd_?1\.?5|instantid|photomaker|faceid|ip[-_]?adapter(?!_pulid)", re.I)


def _missing(name: str, record: WeightFile | None, folders: list[Path]) -> str:
    """What to tell somebody whose file is in none of the folders."""
    looked = f"was not found. Looked in: {_listed(folders)}."
    if record is None and FOREIGN_NAME.search(name):
        return (
            f"{name} {looked} By its name it belongs to another pack's nodes, and this one reads PuLID's files for "
            "SDXL alone. Choose one of the list, such as pulid_v1.1.safetensors."
        )
    if record is None:
        return f"{name} {looked} Put it in {shown(folders[0] if folders else Path('models'))}, or choose another file."
    target = folders[0] if folders else Path("models", record.folders[0])
    return (
        f"{name} ({record.needed_for}) {looked} Download it from {record.url} and put it at "
        f"{shown(target / record.name)}. Licence: {record.licence}."
    )


def _listed(folders: list[Path]) -> str:
    return ", ".join(map(shown, folders)) or "no folder (none is configured)"
