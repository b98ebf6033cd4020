"""Makes the request of test_job.py in a process of its own, and writes the request's id: for tests that end it."""

import asyncio
import os
import sys
from pathlib import Path

from pulid_sdxl.hosted.job import generate
from pulid_sdxl.hosted.service import open_service

from .test_job import a_job


async def main(folder: Path) -> None:
    async with open_service(os.environ, folder, lambda: False, lambda progress: None) as service:
        print((await generate(a_job(), service)).request_id)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
