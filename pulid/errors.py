"""Every error this pack raises on purpose; those of the hosted service are drawn in hosted/errors.py.

    PulidError
    ├── InputError            a value from the graph cannot be used (shape, range, NaN, empty)
    │   └── NoFaceError       a photograph shows no face
    ├── MismatchError         two things that do not belong together (versions, widths, a model that is not SDXL)
    ├── WeightsError          a weight file
    │   ├── MissingWeights    it is not where it was looked for
    │   ├── ForeignWeights    it is whole, but something else than what was asked for
    │   ├── DamagedWeights    truncated, altered, or not a weight file at all
    │   └── DownloadError     it could not be fetched whole
    ├── IdentityFileError     an identity file: not there, something else, truncated, altered, or not to be written
    └── MissingPackage        a Python package that the node needs cannot be imported

A message says what was expected, what was found, and what to do next.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class PulidError(Exception):
    """Base of all errors of this pack; catching it catches nothing else.

    ComfyUI shows the module's name before that of the class; a pack's is its path on the user's disk.
    """

    __module__ = "pulid"

    def __init_subclass__(cls) -> None:
        cls.__module__ = PulidError.__module__


class InputError(PulidError, ValueError):
    """A value from the graph cannot be used."""


class NoFaceError(InputError):
    """A photograph shows no face."""


class MismatchError(PulidError, ValueError):
    """Two things that do not belong together."""


class WeightsError(PulidError):
    """A weight file cannot be used."""


class MissingWeights(WeightsError, FileNotFoundError):
    """A weight file is not where it was looked for."""


class ForeignWeights(WeightsError):
    """A whole weight file, but of something else."""


class DamagedWeights(WeightsError):
    """A truncated or altered file, or one that never was a weight file."""


class DownloadError(WeightsError):
    """A weight file could not be fetched whole; nothing lies under its name."""


class IdentityFileError(PulidError):
    """An identity file cannot be read or written."""


class MissingPackage(PulidError, ImportError):
    """A Python package that is needed here cannot be imported."""


@contextmanager
def about(which: str) -> Iterator[None]:
    """An InputError raised inside says first what it is about, such as "Picture 2 of 5"."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{which}: {error}") from error
