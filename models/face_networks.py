"""The face networks behind one protocol: InsightFace's antelopev2, and facexlib's RetinaFace and BiSeNet.

They are given as files, built at first use and kept; nothing here downloads. InsightFace's and facexlib's own networks
are used, so the numbers are the authors'. InsightFace from 0.7.3 to 2.1 serves.
Sources: https://github.com/deepinsight/insightface, https://github.com/xinntao/facexlib
"""

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..pulid.errors import ForeignWeights, MismatchError, MissingWeights, PulidError
from ..pulid.faces import Face, faces_of
from ..pulid.networks import Bring, Managed, on_cpu
from ..pulid.packages import describe, import_package
from ..pulid.photo import Photo
from .catalogue import GLINTR100, SCRFD
from .locate import file_state, shown
from .onnx_providers import LOG_ERRORS, PROVIDERS
from .retinaface import find_faces
from .tensors import damaged, label, read_tensors, source, system_trouble, unread

log = logging.getLogger(__name__)

OWN_SIZE = (640, 640)  # px, at which InsightFace looks for faces where nobody says otherwise
FACE_PARTS = 19  # labels of BiSeNet trained on CelebAMask-HQ
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class OnnxModel(Protocol):
    """What is used of InsightFace's detector and recogniser; images are BGR."""

    taskname: str
    session: Any

    def detect(self, image: np.ndarray, input_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(n, 5): box and score; (n, 5, 2): landmarks."""

    def get(self, image: np.ndarray, face: SimpleNamespace) -> np.ndarray:
        """The embedding (512,) of the face whose landmarks are `face.kps`."""

    def get_feat(self, image: np.ndarray) -> np.ndarray:
        """The embedding (1, 512) of an image that is only shrunk."""


class InsightFaceAnalyzer:
    """The FaceAnalyzer of pulid/faces.py, on real networks.

    antelope    folder that holds antelopev2's detector and recogniser (models/locate.py finds it)
    retinaface  facexlib's detection_Resnet50_Final.pth
    bisenet     facexlib's parsing_bisenet.pth
    providers   for the two ONNX networks, from available_providers()
    manage      takes charge of a torch network and returns what brings it to its device; here it stays on the CPU

    Raises MissingWeights at once if a file is not there; WeightsError or MissingPackage at first use.
    """

    def __init__(
        self,
        antelope: Path,
        retinaface: Path,
        bisenet: Path,
        providers: Sequence[str] = (PROVIDERS["CPU"],),
        manage: Callable[[nn.Module], Bring] = lambda network: on_cpu(network).load,
    ):
        self._detector_file = antelope / SCRFD.name
        self._recogniser_file = antelope / GLINTR100.name
        self._retinaface_file = retinaface
        self._bisenet_file = bisenet
        for file in (self._detector_file, self._recogniser_file, retinaface, bisenet):
            if not file.is_file():
                raise MissingWeights(f"{file.name} was not found in {shown(file.parent)}. Put it there.")
        self._providers = list(providers)
        self._manage = manage

    @property
    def source(self) -> Hashable:
        """The files and their state, and what runs them."""
        files = self._detector_file, self._recogniser_file, self._retinaface_file, self._bisenet_file
        return (*map(file_state, files), *self._providers)

    # ---- What InsightFace's own FaceAnalysis has, for the nodes of other packs ----

    @property
    def det_model(self) -> OnnxModel:
        """The detector; others set the size at which `get` looks as its `input_size`."""
        return self._detector

    @property
    def models(self) -> dict[str, OnnxModel]:
        return {"detection": self._detector, "recognition": self._recogniser}

    def prepare(self, ctx_id: int = 0, det_thresh: float = 0.5, det_size: tuple[int, int] | None = None) -> None:
        """ctx_id chose between CPU and GPU; here the provider is chosen when loading."""
        detector: Any = self._detector
        detector.det_thresh, detector.input_size = det_thresh, det_size or OWN_SIZE

    def get(self, img: np.ndarray, max_num: int = 0, det_metric: str = "default") -> list[Any]:
        """InsightFace's Face of every face in a BGR image, with its embedding."""
        face_type = import_package("insightface.app.common").Face
        size = getattr(self._detector, "input_size", None)
        size = (size, size) if isinstance(size, int) else size
        if not (isinstance(size, tuple) and all(isinstance(side, int) for side in size)):
            size = OWN_SIZE  # not set, or InsightFace 2's list of sizes
        detector: Any = self._detector
        rows, landmarks = detector.detect(img, input_size=size, max_num=max_num, metric=det_metric)
        faces = [
            face_type(bbox=row[:4], kps=points, det_score=row[4]) for row, points in zip(rows, landmarks, strict=True)
        ]
        for face in faces:
            face.embedding = self._recogniser.get(img, face)
        return faces

    # ---- What this pack asks ----

    def detect(self, photo: Photo, side: int) -> list[Face]:
        """InsightFace's faces in the photograph, fitted into a square of `side` px, a multiple of 32."""
        # The size goes to detect(): since InsightFace 1.0 the detector's own `input_size` is ignored.
        rows, landmarks = self._detector.detect(bgr(photo), input_size=(side, side))
        return faces_of(rows[:, :4], landmarks, rows[:, 4])

    def detect_for_alignment(self, photo: Photo) -> list[Face]:
        """RetinaFace's faces, at the photograph's own size."""
        return find_faces(self._retinaface.module, bgr(photo), self._retinaface.load())

    def recognise(self, photo: Photo, face: Face) -> Tensor:
        """ArcFace embedding (512,) of a face, aligned as ArcFace was trained: to 112 px by its landmarks."""
        landmarks = face.landmarks.astype(np.float32)  # as the detector gave them; InsightFace aligns in this precision
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="insightface")  # its use of scikit-image
            return torch.from_numpy(self._recogniser.get(bgr(photo), SimpleNamespace(kps=landmarks)))

    def recognise_crop(self, crop: np.ndarray) -> Tensor:
        """ArcFace embedding (512,) of a crop (512, 512, 3) that is only shrunk to 112 px."""
        return torch.from_numpy(self._recogniser.get_feat(bgr(crop))[0])

    def parse(self, crops: Tensor) -> Tensor:
        """BiSeNet's label map: (B, 3, 512, 512) RGB 0..1 -> (B, 512, 512) uint8."""
        device = self._bisenet.load()
        mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD))[..., None, None]
        with torch.inference_mode():
            # One crop at a time keeps the peak low. Of BiSeNet's three outputs, two only helped its training.
            normalised = ((crops.cpu().float() - mean) / std).to(device).split(1)
            return torch.cat([self._bisenet.module(crop)[0].max(1).indices.byte() for crop in normalised]).cpu()

    @cached_property
    def _detector(self) -> OnnxModel:
        return load_onnx(self._detector_file, "detection", self._providers)

    @cached_property
    def _recogniser(self) -> OnnxModel:
        return load_onnx(self._recogniser_file, "recognition", self._providers)

    @cached_property
    def _retinaface(self) -> Managed[nn.Module]:
        retinaface = import_package("facexlib.detection.retinaface")
        network = load_torch(self._retinaface_file, lambda: retinaface.RetinaFace("resnet50", device="meta"))
        return Managed(network, self._manage(network))

    @cached_property
    def _bisenet(self) -> Managed[nn.Module]:
        bisenet = import_package("facexlib.parsing.bisenet")
        network = load_torch(self._bisenet_file, lambda: bisenet.BiSeNet(FACE_PARTS))
        return Managed(network, self._manage(network))


class SharedFaceAnalysis(InsightFaceAnalyzer):
    """The same around the InsightFace FaceAnalysis that another pack's node loaded.

    Raises MismatchError where that lacks a detector or a recogniser.
    """

    def __init__(
        self,
        analysis: Any,
        retinaface: Path,
        bisenet: Path,
        manage: Callable[[nn.Module], Bring] = lambda network: on_cpu(network).load,
    ):  # fmt: skip
        models = getattr(analysis, "models", None) or {}
        if "recognition" not in models or getattr(analysis, "det_model", None) is None:
            raise MismatchError(
                "face_analysis holds no InsightFace with a detector and a recogniser, but "
                f"{type(analysis).__module__}.{type(analysis).__qualname__} with {', '.join(models) or 'nothing'}. "
                "Connect Load InsightFace (PuLID) (PulidInsightFaceLoader)."
            )
        self._detector, self._recogniser = analysis.det_model, models["recognition"]  # in place of our own
        self._identity = object()
        self._retinaface_file, self._bisenet_file, self._manage = retinaface, bisenet, manage

    @property
    def recogniser_name(self) -> str:
        """The file name of the recogniser, where it is known."""
        return Path(getattr(self._recogniser, "model_file", None) or "").name

    @property
    def source(self) -> Hashable:
        """Of the networks themselves, since nothing is known of the files that they came from."""
        files = file_state(self._retinaface_file), file_state(self._bisenet_file)
        return self._identity, *files


class MissingFaceNetworks:
    """Stands where the face networks would be, and says what they lack as soon as one is asked for something.

    Each time a new exception is raised: one that is kept would keep alive whatever was under way when it was raised.
    """

    source = "no face networks"

    def __init__(self, error: PulidError):
        self._kind, self._words = type(error), str(error)

    def _refuse(self, *_: object) -> NoReturn:
        raise self._kind(self._words)

    detect = detect_for_alignment = recognise = recognise_crop = parse = _refuse


def load_onnx(file: Path, task: str, providers: list[str]) -> OnnxModel:
    """InsightFace's model of an ONNX file that must serve this task, "detection" or "recognition".

    Raises DamagedWeights for bytes that are no ONNX graph, ForeignWeights for another network, WeightsError where
    memory, a disk or a device failed.
    """
    onnxruntime = import_package("onnxruntime")
    bindings = import_package("onnxruntime.capi.onnxruntime_pybind11_state")
    zoo = import_package("insightface.model_zoo")
    options = onnxruntime.SessionOptions()
    # SCRFD's file declares shapes for 640 px, and there is a warning at every other size.
    options.log_severity_level = LOG_ERRORS
    # Threads that wait in a circle for the next photograph take the processor from torch, which has the next turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # One session serves all sizes; InsightFace 2 would otherwise build and keep one for each. Version 1 ignores
        # this and the options.
        model = zoo.get_model(str(file), providers=providers, sess_options=options, static_shape_sessions=False)
    except (bindings.InvalidProtobuf, bindings.InvalidGraph, bindings.InvalidArgument, ValueError) as error:
        raise damaged(file, "is not a whole ONNX file") from error
    except Exception as error:  # ONNX Runtime's own classes, which say little of whose fault it is
        raise unread(file, system_trouble(error) or describe(error)) from error
    if model is None or model.taskname != task:
        found = "another network" if model is None else f"a network for {model.taskname}"
        raise ForeignWeights(
            f"Expected a network for {task}, found {found}: {label(file)}. Get it again{source(file)}."
        )
    log.info("%s runs on %s", file.name, model.session.get_providers()[0])
    return model


def load_torch(file: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The network that `make` builds on the CPU, with the weights of one of facexlib's files, ready to run."""
    # Trained on several GPUs, RetinaFace was saved with `module.` before every name.
    read = {name.removeprefix("module."): tensor for name, tensor in read_tensors(file).items()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read.items()}
    # On the meta device nothing is drawn at random only to be replaced: it is quick, and the host's numbers stay.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # facexlib's deprecated argument
        network = make()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        words = f"{label(file)} holds another network's weights. Get it again{source(file)}."
        raise ForeignWeights(words) from error
    return network.eval().requires_grad_(False)


def bgr(image: np.ndarray) -> np.ndarray:
    """RGB to BGR, which InsightFace and facexlib take."""
    return np.ascontiguousarray(image[..., ::-1])
