"""Triton's own compiler and launches for a card that is not there: `python pretended_card.py CAPABILITY`, e.g. 90.

Tensors lie on the CPU, and what would be launched is written down instead. Prints JSON.
"""

import json
import runpy
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROOT = Path(__file__).resolve().parents[2]
PROPERTIES = {"max_shared_mem": 99 * 1024}  # of the cards that have least


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, capability: int):
        self.launched: list[dict] = []
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: f"stream of {device}"
        self.get_active_torch_device = lambda: torch.device("cpu")
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024), get_device_properties=lambda _: PROPERTIES
        )

    def launcher_cls(self, source: object, metadata: object):
        def launch(x, y, z, stream, function, facts, launch_metadata, enter, leave, *arguments):
            by_triton = any(isinstance(one, torch.Tensor) for one in arguments)
            addresses = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
            named = [self.names.get(one, "table") if isinstance(one, int) and one > 2**20 else one for one in addresses]
            self.launched.append({"by_triton": by_triton, "launch": [function, [x, y, z], stream, *named]})

        return launch


def main(capability: int) -> None:
    runpy.run_path(str(ROOT / "run.py"))["mount_pack"]()
    from pulid_sdxl.pulid.attention import Fusion, SiteKV
    from pulid_sdxl.pulid.fused import Fused

    card = Driver(capability)
    driver.set_active(card)
    _triton.has_triton = lambda: True  # or torch.compile takes no kernel for one
    torch.Tensor.get_device = lambda tensor: 0
    torch.cuda.current_device = lambda: 0
    q, base = torch.randn(2, 2, 64, 128).half()
    keys, values = torch.randn(2, 3, 6, 128).half()
    kv, strength, mask = SiteKV(keys, values).prepare(2, 8), torch.tensor(0.5).half(), torch.rand(2, 64).half()
    tensors = {"q": q, "base": base, "keys": kv.keys, "values": kv.values, "strength": strength, "mask": mask}
    card.names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    shifted = torch.randn(1 + q.numel()).half()[1:].view_as(q)  # begins where kernels expect no tensor to begin
    seen: dict[str, list] = {}
    for fusion, more in product(Fusion, ((), (strength, mask))):
        site = Fused(kv, fusion)
        compiled = torch.compile(lambda *args, site=site: site(*args), backend="eager", fullgraph=True)
        calls = [(site, q), (site, q), (site, shifted), (compiled, q)]
        seen[f"{fusion.value}, {len(more)} more"] = runs = []
        for call, x in calls:
            call(x, base, (2, 0), *(more or (None, None)), True)
            runs.append(card.launched.copy())
            card.launched.clear()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]))
