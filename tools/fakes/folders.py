"""The folders of a ComfyUI, for tests that have none."""

from pathlib import Path

from ...models.catalogue import CATALOGUE
from ...models.locate import ModelFolders


def folders_below(models: Path, elsewhere: tuple[Path, ...] = ()) -> ModelFolders:
    """Those of a `models` folder as ComfyUI lays it out."""
    names = {folder.partition("/")[0] for file in CATALOGUE for folder in file.folders}
    return ModelFolders({name: [models / name] for name in names}, elsewhere)
