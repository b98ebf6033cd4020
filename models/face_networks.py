"""The face networks behind one protocol: InsightFace's antelopev2, and facexlib's RetinaFace and BiSeNet.

They are given as files, built at first use and kept; nothing here downloads. InsightFace's and facexlib's own networks
and decoding are used, so the numbers are the authors'. InsightFace from 0.7.3 to 2.1 serves.
Sources: https://github.com/deepinsight/insightface, https://github.com/xinntao/facexlib
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from ..pulid.encoders import ARCFACE_WIDTH
from ..pulid.errors import DamagedWeights, ForeignWeights, MissingWeights, PulidError
from ..pulid.faces import Face, Photo, faces_of
from ..pulid.packages import describe, import_package
from .catalogue import GLINTR100, SCRFD
from .locate import state_of
from .onnx_graph import graph_alone
from .onnx_providers import PROVIDERS
from .tensors import read_tensors

log = logging.getLogger(__name__)

RETINAFACE_SCORE = 0.97  # facexlib's FaceRestoreHelper keeps faces above this
FACE_PARTS = 19  # labels of BiSeNet trained on CelebAMask-HQ
CAFFE_MEAN = (104.0, 117.0, 123.0)  # BGR, what RetinaFace was trained with
ARCFACE_SIZE = 112  # px a side
FIRST_THAT_MAPS = (1, 21)  # ONNX Runtime
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CPU = torch.device("cpu")
Bring = Callable[[], torch.device]  # brings a network to the device it is to run on, and returns that


class InsightFaceAnalyzer:
    """The FaceAnalyzer of pulid/faces.py, on real networks.

    antelope    folder that holds antelopev2's detector and recogniser (models/files.py finds it)
    retinaface  facexlib's detection_Resnet50_Final.pth
    bisenet     facexlib's parsing_bisenet.pth
    providers   for the two ONNX networks, from available_providers()
    manage      takes charge of a torch network and returns what brings it to its device; here it stays on the CPU

    Raises MissingWeights at once if a file is not there; DamagedWeights, ForeignWeights or MissingPackage at first use.
    """

    def __init__(
        self,
        antelope: Path,
        retinaface: Path,
        bisenet: Path,
        providers: Sequence[str] = (PROVIDERS["CPU"],),
        manage: Callable[[nn.Module], Bring] = lambda network: lambda: CPU,
    ):
        self._detector_file = antelope / SCRFD.name
        self._recogniser_file = antelope / GLINTR100.name
        self._retinaface_file = retinaface
        self._bisenet_file = bisenet
        for file in (self._detector_file, self._recogniser_file, retinaface, bisenet):
            if not file.is_file():
                raise MissingWeights(f"{file.name} was not found in {file.parent}. Put it there.")
        self._providers = list(providers)
        self._manage = manage

    @property
    def source(self) -> tuple:
        """Tells these weights from others, and what runs them."""
        files = self._detector_file, self._recogniser_file, self._retinaface_file, self._bisenet_file
        return (*map(state_of, files), *self._providers)

    def detect(self, photo: Photo, side: int) -> list[Face]:
        """InsightFace's faces in the photograph, fitted into a square of `side` px, a multiple of 32."""
        # The size goes to detect(): since InsightFace 1.0 the detector's own `input_size` is ignored.
        rows, landmarks = self._detector.detect(bgr(photo), input_size=(side, side))  # (n, 5): box, score; (n, 5, 2)
        return faces_of(rows[:, :4], landmarks, rows[:, 4])

    def detect_for_alignment(self, photo: Photo) -> list[Face]:
        """RetinaFace's faces, at the photograph's own size."""
        network, bring = self._retinaface
        network.device = bring()
        network.mean_tensor = network.mean_tensor.to(network.device)
        with torch.inference_mode():
            rows = network.detect_faces(bgr(photo), RETINAFACE_SCORE)  # (n, 15): box, score, landmarks
        return faces_of(rows[:, :4], rows[:, 5:].reshape(-1, 5, 2), rows[:, 4])

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
        network, bring = self._bisenet
        device = bring()
        mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD))[..., None, None]
        with torch.inference_mode():
            # One crop at a time keeps the peak low. Of BiSeNet's three outputs, two only helped its training.
            crops = ((crops.cpu().float() - mean) / std).to(device).split(1)
            return torch.cat([network(crop)[0].argmax(1).byte() for crop in crops]).cpu()

    @cached_property
    def _detector(self):
        return load_onnx(self._detector_file, "detection", self._providers)

    @cached_property
    def _recogniser(self):
        return load_onnx(self._recogniser_file, "recognition", self._providers)

    @cached_property
    def _retinaface(self) -> tuple[nn.Module, Bring]:
        retinaface = import_package("facexlib.detection.retinaface")
        network = load_torch(self._retinaface_file, lambda: retinaface.RetinaFace("resnet50", device="meta"))
        network.mean_tensor = torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1)  # no part of its weights
        return network, self._manage(network)

    @cached_property
    def _bisenet(self) -> tuple[nn.Module, Bring]:
        bisenet = import_package("facexlib.parsing.bisenet")
        network = load_torch(self._bisenet_file, lambda: bisenet.BiSeNet(FACE_PARTS))
        return network, self._manage(network)


class AbsentAnalyzer:
    """Stands where the face networks would be, and says what they lack as soon as one is asked for."""

    source = ("no face networks",)

    def __init__(self, error: PulidError):
        self._error = error

    def __getattr__(self, name: str):
        raise self._error


def load_onnx(file: Path, task: str, providers: list[str]):
    """InsightFace's model of an ONNX file that must serve this task, "detection" or "recognition"."""
    onnxruntime = import_package("onnxruntime")
    bindings = import_package("onnxruntime.capi.onnxruntime_pybind11_state")
    zoo = import_package("insightface.model_zoo")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: SCRFD's file declares shapes for 640 px and warns at every other size
    open_model = open_mapped if task == "recognition" and can_map(onnxruntime, providers) else open_whole
    try:
        model = open_model(zoo, file, options, providers)
    except (bindings.InvalidProtobuf, bindings.InvalidGraph, bindings.InvalidArgument, ValueError) as error:
        raise DamagedWeights(f"{file.name} in {file.parent} is not a whole ONNX file. Get it again.") from error
    except (bindings.Fail, bindings.RuntimeException, bindings.NotImplemented, bindings.EPFail) as error:
        words = describe(error)
        raise DamagedWeights(
            f"ONNX Runtime could not open {file.name} in {file.parent} ({words}). If that names no trouble of the "
            "device, get the file again."
        ) from error
    if model is None or model.taskname != task:
        found = "another network" if model is None else f"a network for {model.taskname}"
        raise ForeignWeights(
            f"Expected a network for {task}, found {found}: {file.name} in {file.parent}. Get it again."
        )
    log.info("%s runs on %s", file.name, model.session.get_providers()[0])
    return model


def open_whole(zoo: ModuleType, file: Path, options, providers: list[str]):
    """InsightFace's own way: ONNX Runtime reads the file and lays the weights out for this machine."""
    # One session serves all sizes; InsightFace 2 would otherwise build and keep one for each. Version 1 ignores this
    # and the options.
    return zoo.get_model(str(file), providers=providers, sess_options=options, static_shape_sessions=False)


def open_mapped(zoo: ModuleType, file: Path, options, providers: list[str]):
    """The same for a recogniser, whose weights stay mapped from the file: a tenth of the time, a third of the memory.

    None if it is no recogniser. A face takes 20 ms longer on the CPU, where ALL would lay the weights out anew.
    """
    file = file.resolve()  # ONNX Runtime follows no link out of the folder
    if (graph := graph_alone(file)) is None:
        return open_whole(zoo, file, options, providers)
    options.graph_optimization_level = import_package("onnxruntime").GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    session = zoo.model_zoo.PickableInferenceSession(graph, sess_options=options, providers=providers)
    shapes = [end.shape[1:] for end in (*session.get_inputs(), *session.get_outputs())]
    if shapes != [[3, ARCFACE_SIZE, ARCFACE_SIZE], [ARCFACE_WIDTH]]:
        return None
    return zoo.ArcFaceONNX(BytesIO(graph), session)  # it looks at the graph's first nodes for the range of its input


def can_map(onnxruntime: ModuleType, providers: list[str]) -> bool:
    """Whether this ONNX Runtime finds weights that lie outside a graph in memory, for providers known to take them."""
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    return version >= FIRST_THAT_MAPS and set(providers) <= {PROVIDERS["CPU"], PROVIDERS["CUDA"]}


def load_torch(file: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The network that `make` builds on the CPU, with the weights of one of facexlib's files, ready to run."""
    # Trained on several GPUs, RetinaFace was saved with `module.` before every name.
    state = {name.removeprefix("module."): tensor for name, tensor in read_tensors(file).items()}
    # On the meta device nothing is drawn at random only to be replaced: it is quick, and the host's numbers stay.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # facexlib's deprecated argument
        network = make()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ForeignWeights(f"{file.name} in {file.parent} holds another network's weights. Get it again.") from error
    return network.eval().requires_grad_(False)


def bgr(image: np.ndarray) -> np.ndarray:
    """RGB to BGR, which InsightFace and facexlib take."""
    return np.ascontiguousarray(image[..., ::-1])
