"""Which of ONNX Runtime's execution providers are offered here, which can really be loaded, and why one cannot."""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from ..pulid.errors import InputError
from ..pulid.packages import describe, import_package

# What a user calls an ONNX execution provider, fastest first; the CPU can always run what the others cannot.
PROVIDERS = {
    "CUDA": "CUDAExecutionProvider",
    "MIGraphX": "MIGraphXExecutionProvider",
    "ROCM": "ROCMExecutionProvider",
    "DirectML": "DmlExecutionProvider",
    "CoreML": "CoreMLExecutionProvider",
    "CPU": "CPUExecutionProvider",
}


def available_providers(choice: str = "auto") -> list[str]:
    """ONNX Runtime's names of the providers to use: "auto" is all it offers here, else one of PROVIDERS; CPU last.

    Raises InputError for a provider that the installed ONNX Runtime does not offer, MissingPackage without any.
    """
    offered = import_package("onnxruntime").get_available_providers()
    here = [name for name, provider in PROVIDERS.items() if provider in offered]
    if choice != "auto" and choice not in here:
        raise InputError(
            f"The installed ONNX Runtime does not offer {choice!r}; it offers: {', '.join(here)}. Choose one of these "
            "or 'auto'. For NVIDIA, onnxruntime-gpu takes the place of onnxruntime: never install both."
        )
    wanted = here if choice == "auto" else [choice, "CPU"]
    return list(dict.fromkeys(PROVIDERS[name] for name in wanted))


# A network of one node that hands its input on, in ONNX's protobuf: enough to see which provider takes it.
IDENTITY = bytes.fromhex(
    "080812003a370a100a01781201792208" "4964656e746974791201675a0f0a0178"
    "120a0a08080112040a020801620f0a01" "79120a0a08080112040a02080142040a" "00100d"
)  # fmt: skip
LOG_ERRORS = 3  # ONNX Runtime's log severity: errors and what is fatal, but no warnings

# The library of a provider, without what a system puts around its name; the others are part of ONNX Runtime itself.
LIBRARIES = {
    "CUDAExecutionProvider": "onnxruntime_providers_cuda",
    "ROCMExecutionProvider": "onnxruntime_providers_rocm",
    "MIGraphXExecutionProvider": "onnxruntime_providers_migraphx",
}
SHARED = "onnxruntime_providers_shared"  # the others need what it has


def provider_in_use(providers: Sequence[str]) -> tuple[str, str | None]:
    """What a session asked for these providers runs on, as a user calls it, and why it is not the first of them.

    ONNX Runtime goes on with the next provider where one does not load, and says so in its log alone.
    """
    onnxruntime = import_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_ERRORS
    used = onnxruntime.InferenceSession(IDENTITY, options, providers=list(providers)).get_providers()[0]
    name = next((name for name, provider in PROVIDERS.items() if provider == used), used)
    return name, None if used == providers[0] else why_not(providers[0])


def why_not(provider: str) -> str:
    """The system's own words on why a provider's library cannot be loaded."""
    folder = Path(str(import_package("onnxruntime").__file__)).parent / "capi"
    for library in (SHARED, LIBRARIES.get(provider)):
        if library is None:
            return "ONNX Runtime gives no reason"
        path = folder / (f"{library}.dll" if sys.platform == "win32" else f"lib{library}.so")
        if not path.is_file():
            return f"{path.name} is not part of this onnxruntime"
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return describe(error).replace(str(folder), "onnxruntime")
    return "its library loads, but it found no device or other versions of its libraries than it needs"
