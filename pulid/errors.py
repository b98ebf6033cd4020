"""Every error this pack raises on purpose.

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
    ├── HostedError           the hosted service, or the way to it
    │   ├── MissingKey        there is no key that could be used
    │   ├── Unreachable       no connection came about: nothing was sent
    │   ├── AnswerLost        sent, but no whole answer came back
    │   ├── BadAnswer         an answer that means nothing (not JSON, fields missing, not a picture)
    │   ├── Refused           the service said no, and nothing runs
    │   ├── AmbiguousSubmit   a request may have been accepted and billed, and nobody knows
    │   ├── JobFailed         accepted, and then it failed
    │   │   └── JobCancelled  it ended because somebody asked for it
    │   ├── HostedLimit       a limit of time, or of pictures, that the user has set
    │   ├── UnsafeAddress     an address that must not be read from or sent to
    │   └── Interrupted       the user stopped waiting
    └── MissingPackage        a Python package that the node needs cannot be imported

A message says what was expected, what was found, and what to do next.
"""


class PulidError(Exception):
    """Base of all errors of this pack; catching it catches nothing else."""


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


class HostedError(PulidError):
    """The hosted service, or the way to it."""


class MissingKey(HostedError):
    """There is no key that could be used."""


class Unreachable(HostedError, ConnectionError):
    """No connection came about, so nothing was sent."""


class AnswerLost(HostedError, ConnectionError):
    """A request was sent, wholly or in part, and no whole answer came back."""


class BadAnswer(HostedError, ValueError):
    """An answer that means nothing."""


class Refused(HostedError):
    """The service said no, and nothing runs."""


class AmbiguousSubmit(HostedError):
    """A request may have been accepted and billed, and nobody knows."""


class JobFailed(HostedError):
    """A request was accepted, and then failed."""


class JobCancelled(JobFailed):
    """A request was accepted, and ended because somebody asked for it."""


class HostedLimit(HostedError):
    """A limit of time, or of pictures, that the user has set."""


class UnsafeAddress(HostedError, ValueError):
    """An address that must not be read from or sent to."""


class Interrupted(HostedError):
    """The user stopped waiting."""
