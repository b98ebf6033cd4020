"""Times from photograph to identity in one process, ours or the published way; tools/bench.py runs both.

bench_encoding.py make FOLDER LAYOUT             writes stand-ins of all files, PuLID's in one of tools/standins.py
bench_encoding.py ours FOLDER COMFYUI COUNT      prints seconds: COUNT photographs, then the last one again
bench_encoding.py published FOLDER COMFYUI COUNT
bench_encoding.py peak FOLDER COMFYUI COUNT      prints bytes: the peak of encoding COUNT photographs at once
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch

from ..models import checkpoints, face_networks
from ..pulid.encode import VISION_SIZE, grey_on_white, to_vision_input
from ..pulid.networks import PhotoNetworks, PulidWeights
from ..pulid.tokens import face_vectors

PULID, TOWER = "pulid.safetensors", "eva.pt"
PARSENET = "parsing_parsenet.pth"  # what facexlib builds beside the parsing network that is used

Encode = Callable[[np.ndarray], None]  # of a photograph (H, W, 3) uint8 RGB


def make(folder: Path, layout: str) -> None:
    import onnx
    from facexlib.parsing.parsenet import ParseNet

    from .fakes import standin_faces, standins

    standin_faces.make_face_models(folder)
    recogniser = folder / "insightface/models/antelopev2/glintr100.onnx"
    onnx.save(standin_faces.make_iresnet100(), recogniser)  # as large and slow as the real one
    torch.save(ParseNet(in_size=512, out_size=512, parsing_ch=19).state_dict(), folder / "facexlib" / PARSENET)
    standins.make_pulid(folder / PULID, layout=layout, width_scale=0.1)
    standins.make_eva(folder / TOWER, layout="published")


def loaded(folder: Path, comfyui: str):
    """What the loader node gives."""
    from . import comfy_host

    comfy_host.enter(comfyui)
    from ..nodes import host
    from ..nodes.types import LoadedPulid

    checkpoint = checkpoints.load_pulid(folder / PULID, host.OPERATIONS)
    tower = checkpoints.load_vision_tower(folder / TOWER, host.OPERATIONS)
    analyzer = face_networks.InsightFaceAnalyzer(
        folder / "insightface/models/antelopev2",
        folder / "facexlib/detection_Resnet50_Final.pth",
        folder / "facexlib/parsing_bisenet.pth",
        manage=host.manage,
    )
    encoder, projections = (host.managed(module, "bench") for module in (checkpoint.encoder, checkpoint.projections))
    weights = PulidWeights(checkpoint.version, checkpoint.fingerprint, encoder, projections)
    return LoadedPulid(weights, PhotoNetworks(host.managed(tower, "bench"), analyzer))


def encode(pulid, photos: np.ndarray) -> None:
    from ..nodes.encode import PulidEncode

    image = torch.from_numpy(photos).float().div_(255)
    PulidEncode.execute([pulid], [image], ["largest"], [0], ["one person"], [False], ["stop"])


def ours(folder: Path, comfyui: str) -> Encode:
    pulid = loaded(folder, comfyui)
    return lambda photo: encode(pulid, photo[None])


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as EVA-CLIP is published, where xformers is not installed."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def published(folder: Path, comfyui: str) -> Encode:
    """As the authors and the packs after them publish it: the same networks in float32, attention written out, three
    of facexlib's networks built again for each call, and the encoder run twice.
    """
    torch.nn.functional.scaled_dot_product_attention = written_out
    from facexlib.parsing import init_parsing_model
    from facexlib.utils.face_restoration_helper import FaceRestoreHelper
    from insightface.app import FaceAnalysis

    tower = checkpoints.load_vision_tower(folder / TOWER).float()
    encoder = checkpoints.load_pulid(folder / PULID).encoder.float()
    facexlib = {"device": "cpu", "model_rootpath": str(folder / "facexlib")}
    sessions = []

    def encode_photo(photo: np.ndarray) -> None:
        if not sessions:  # the detector and the recogniser only; it also runs antelopev2's others where they are there
            antelope = str(folder / "insightface/models/antelopev2")
            sessions.append(FaceAnalysis(antelope, providers=["CPUExecutionProvider"]))
            sessions[0].prepare(ctx_id=0, det_size=(640, 640))
        image = np.ascontiguousarray(photo[..., ::-1])
        helper = FaceRestoreHelper(1, face_size=512, crop_ratio=(1, 1), **facexlib)
        parse = init_parsing_model("bisenet", **facexlib)
        found = max(sessions[0].get(image), key=lambda face: np.prod(face.bbox[2:] - face.bbox[:2]))
        helper.read_image(image)
        helper.get_face_landmarks_5(only_center_face=True)
        helper.all_landmarks_5 = [found.kps]  # the stand-in of RetinaFace looks, but sees nothing
        helper.align_warp_face()
        crop = torch.from_numpy(helper.cropped_faces[0][..., ::-1].copy()).permute(2, 0, 1)[None] / 255
        labels = parse(crop)[0].argmax(1)
        features = tower.features(to_vision_input(grey_on_white(crop, labels)))
        x = face_vectors(torch.from_numpy(found.embedding)[None], features)
        encoder(x, features.hidden)
        encoder(torch.zeros_like(x), [torch.zeros_like(stream) for stream in features.hidden])

    return encode_photo


def rolled(count: int) -> np.ndarray:
    """So many photographs, each another one to whoever looks at its content: (count, 512, 512, 3) uint8."""
    return np.stack([np.roll(skimage.data.astronaut(), 2 * shift, axis=1) for shift in range(count)])


def times(way: Encode, count: int) -> list[float]:
    import facexlib.detection
    import facexlib.parsing  # noqa: F401
    import insightface.app  # noqa: F401

    photos, measured = rolled(count), []
    for photo in (*photos, photos[-1]):
        start = time.perf_counter()
        way(photo)
        measured.append(time.perf_counter() - start)
    return measured


def peak(folder: Path, comfyui: str, count: int) -> int:
    """Bytes of the process at its highest, less the photographs themselves and the pictures that the node gives."""
    pulid, photos = loaded(folder, comfyui), rolled(count)
    encode(pulid, photos)
    status = Path("/proc/self/status").read_text()
    highest = int(status.split("VmHWM:")[1].split()[0]) * 1024
    given = 5 * photos.nbytes  # as bytes and as an IMAGE of float32
    made = 5 * photos.nbytes + 4 * count * 3 * VISION_SIZE**2  # the same, drawn on; the faces
    return highest - given - made


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    warnings.filterwarnings("ignore", module="torchvision|insightface|facexlib")  # what they do in deprecated ways
    with torch.inference_mode():
        if what == "make":
            make(Path(folder), rest[0])
        elif what == "peak":
            print(peak(Path(folder), rest[0], int(rest[1])))
        else:
            way = {"ours": ours, "published": published}[what]
            print(json.dumps(times(way(Path(folder), rest[0]), int(rest[1]))))
