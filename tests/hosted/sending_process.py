"""Makes the request of test_job.py in a process of its own, and writes the request's id: for tests that end it."""

import asyncio
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from mount import mount

mount()

from pulid_sdxl.models.hosted.job import generate  # noqa: E402
from pulid_sdxl.models.hosted.service import open_service  # noqa: E402
from test_job import a_job  # noqa: E402


async def main(folder: Path) -> None:
    async with open_service(os.environ, folder, lambda: False, lambda progress: None) as service:
        print((await generate(a_job(), service)).request_id)


asyncio.run(main(Path(sys.argv[1])))
