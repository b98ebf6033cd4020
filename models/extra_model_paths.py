"""Reads where a ComfyUI keeps its models, extra_model_paths.yaml included, without running ComfyUI.

Source of the format: ComfyUI's utils/extra_config.py and extra_model_paths.yaml.example.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..pulid.errors import InputError
from ..pulid.packages import describe, import_package
from .catalogue import CATALOGUE
from .locate import shown

NAMES = tuple(dict.fromkeys(folder.partition("/")[0] for file in CATALOGUE for folder in file.folders))
LEGACY = {"clip": "text_encoders"}  # as ComfyUI maps them; it looks for the latter in both folders


def model_paths(models: Path, yamls: Iterable[Path] = ()) -> dict[str, list[Path]]:
    """ComfyUI's name of a folder -> its paths in order, for the folders that our files lie in.

    models  the `models` folder
    yamls   files like extra_model_paths.yaml, in the order that ComfyUI reads them

    Raises InputError for a yaml that cannot be read, MissingPackage where this Python has no PyYAML.
    """
    paths = {name: [models / name] for name in NAMES if name not in LEGACY}
    for old, name in LEGACY.items():
        paths[name].append(models / old)
    for yaml in yamls:
        for name, path, first in _entries(yaml):
            known = paths.setdefault(LEGACY.get(name, name), [])
            if path in known and first:
                known.remove(path)
            if path not in known:
                known.insert(0 if first else len(known), path)
    return {name: known for name, known in paths.items() if name in NAMES}


def _entries(file: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name, path, and whether it comes before those already there, of each line of each section."""
    for section in _read(file).values():
        if not isinstance(section, Mapping):
            continue
        base = file.parent.absolute() / os.path.expandvars(os.path.expanduser(str(section.get("base_path", ""))))
        first = str(section.get("is_default", "")).lower() in ("true", "yes", "on")
        for name, lines in section.items():
            if name not in ("base_path", "is_default") and isinstance(lines, str):
                yield from ((name, Path(os.path.normpath(base / line)), first) for line in lines.split("\n") if line)


def _read(file: Path) -> Mapping[str, Any]:
    yaml = import_package("yaml")
    try:
        # The base loader makes texts, lists and mappings alone: no objects, no numbers, no merged copies.
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
        if not isinstance(config, Mapping):
            raise ValueError("it holds no sections")
    except (yaml.YAMLError, OSError, ValueError, RecursionError, TypeError) as error:
        raise InputError(
            f"{shown(file)} cannot be read ({describe(error)}). Expected yaml as in extra_model_paths.yaml.example."
        ) from error
    return config
