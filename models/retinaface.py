"""What facexlib's RetinaFace finds in a photograph, to the bit as its own `detect_faces` gives it.

That lays out anchors one by one in Python, which takes longer for a large photograph than the network on a card.
Sources: RetinaFace (arXiv 1905.00641); https://github.com/xinntao/facexlib
"""

import numpy as np
import torch
from torch import Tensor, nn

from ..pulid.faces import Face, faces_of
from ..pulid.packages import import_package

ANCHORS = {8: (16, 32), 16: (64, 128), 32: (256, 512)}  # px: by the stride of a level, the sides at each place
CENTRE, SIZE = 0.1, 0.2  # variances: what the network's numbers are of an anchor's size, and of its logarithm
SCORE = 0.97  # facexlib's FaceRestoreHelper keeps faces above this
OVERLAP = 0.4  # above which the less certain of two faces is dropped
CAFFE_MEAN = (104.0, 117.0, 123.0)  # BGR, what it was trained with


def find_faces(network: nn.Module, image: np.ndarray, device: torch.device) -> list[Face]:
    """Faces in a BGR image (H, W, 3) uint8, by a network on this device; the most certain first."""
    pixels = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)).unsqueeze(0).to(device)
    with torch.inference_mode():
        offsets, scores, points = (
            each.squeeze(0) for each in network(pixels - pixels.new_tensor(CAFFE_MEAN).view(1, 3, 1, 1))
        )
        found = (scores[:, 1] > SCORE).nonzero().squeeze(1)
        rows = decode(offsets[found], points[found], anchors(*image.shape[:2]).to(device)[found], image.shape[:2])
        faces = torch.cat((rows, scores[found, 1:]), 1).cpu().numpy()
    faces = faces[faces[:, -1].argsort()[::-1]]
    boxes, landmarks, certain = np.split(faces, (4, 14), axis=1)
    nms = import_package("torchvision.ops").nms
    kept = nms(torch.tensor(boxes), torch.tensor(certain.ravel()), OVERLAP).numpy()
    return faces_of(boxes[kept], landmarks[kept].reshape(-1, 5, 2), certain[kept].ravel())


def anchors(height: int, width: int) -> Tensor:
    """(A, 4) float32: middles and sizes, x before y, as shares of an image of this size."""
    levels = []
    for stride, sides in ANCHORS.items():
        rows, columns = -(-height // stride), -(-width // stride)
        y, x, side = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, sides, indexing="ij")
        level = x * stride / width, y * stride / height, side / width, side / height
        levels.append(np.stack(level, axis=-1).reshape(-1, 4))
    return torch.from_numpy(np.concatenate(levels).astype(np.float32))


def decode(offsets: Tensor, points: Tensor, priors: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 14) px: corners of the box and five landmarks, of what the network says (n, 4) and (n, 10) of n anchors."""
    middles, sides = priors[:, :2], priors[:, 2:]
    sized = sides * torch.exp(offsets[:, 2:] * SIZE)
    first = middles + offsets[:, :2] * CENTRE * sides - sized / 2
    landmarks = middles.unsqueeze(1) + points.unflatten(1, (5, 2)) * CENTRE * sides.unsqueeze(1)
    corners = torch.cat((first, sized + first, landmarks.flatten(1)), 1)
    return corners * corners.new_tensor((size[1], size[0])).repeat(7)
