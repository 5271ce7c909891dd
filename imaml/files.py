"""Writing files so that a crash leaves the old one or the new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_SUFFIX = ".writing"


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or nothing, also when the process is killed or the machine stops in between."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX) as folder:
        # An ordinary file in a private folder: it gets the user's permissions, and goes with the folder on failure.
        written = Path(folder) / path.name
        with written.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    for leftover in folder.glob(f".*{_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """The renaming is safe once the folder is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
