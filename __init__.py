"""PuLID for SDXL: keeps a person's identity in generated pictures, without training (arXiv 2404.16022).

ComfyUI loads this file at start. Nothing else of the pack is imported before ComfyUI asks for the nodes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes.extension import PulidExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> "PulidExtension":
    """Called once by ComfyUI; returns the extension that lists the nodes."""
    from .nodes.extension import PulidExtension

    return PulidExtension()
