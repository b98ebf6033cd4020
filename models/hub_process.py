"""Appends one file of Hugging Face to a file here. A program of its own, so that it can be ended at any moment.

It uses huggingface_hub's `http_get`, alike from version 0.24 to 2.4, because `hf_hub_download` no longer goes on from
where an earlier process stopped (huggingface_hub 2), and neither does Xet.
"""

import json
import os
import shutil
import sys
import threading

CHUNK = 1 << 20  # bytes: how far the progress bar moves, and the most that is fetched twice
Answer = dict[str, object]


def fetch(repo_id: str, path: str, revision: str, part: str, size: int | None) -> Answer:
    """What kept the file from coming whole; empty if nothing did. `size` is what was published, in bytes."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK  # before what reads it is imported
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo_id, path, revision=revision)
    offered = get_hf_file_metadata(url).size
    if offered is not None and offered != (size or offered):
        return {"offered": offered}
    with open(part, "ab") as file:
        if offered is not None and file.tell() > offered:
            file.truncate(0)
        missing, free = (offered or 0) - file.tell(), shutil.disk_usage(os.path.dirname(part)).free
        if missing > free:
            return {"missing": missing, "free": free}
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=offered)
        file.flush()
        os.fsync(file.fileno())
    return {}


def what_happened(error: BaseException) -> Answer:
    """The error by its kinds and numbers; its words stay here, since they may hold a signed address or a folder."""
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        kinds += [kind.__name__ for kind in type(cause).__mro__[:2]]
        cause = cause.__cause__ or cause.__context__
    status = getattr(getattr(error, "response", None), "status_code", None)
    return {"status": status, "errno": getattr(error, "errno", None), "kinds": kinds}


def _end_with_parent() -> None:
    os.read(0, 1)  # comes back when whoever started this is gone
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    repo, name, commit, target, published = sys.argv[1:]
    try:
        answer = fetch(repo, name, commit, target, int(published) or None)
    except Exception as error:
        answer = what_happened(error)
    json.dump(answer, sys.stdout)
