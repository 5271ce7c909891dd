"""Folders and zips of pictures, read alike."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Of the files that are taken for pictures, in small or capital letters."""


class Files:
    """The files of a folder or of a zip, by their names relative to it; the names of folders end with a slash.

    Of a zip whose members all lie in one folder, as those of a zipped folder do, the names are relative to that.
    Hidden files are left out, and so is what macOS adds to zips.

    Raises FileNotFoundError where there is neither, and ValueError for a file that is not a readable zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamps: dict[str, str] = {}
        """What changes when the file of that name does."""
        self._inside = ""
        if path.is_dir():
            self.stamps = {name: stamp for name, stamp in _walk(path) if not _hidden(name)}
            return
        if not path.exists():
            raise FileNotFoundError(f"there is no folder or zip {path}.")
        self._reading = threading.Lock()
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} is not a readable zip file ({error}): was its download cut short?") from error
        members = {m.filename: m for m in self._archive.infolist() if not _hidden(m.filename)}
        tops = {name.split("/")[0] for name in members}
        if len(tops) == 1 and all("/" in name for name in members):
            self._inside = f"{tops.pop()}/"
        for path_inside, member in members.items():
            name = path_inside.removeprefix(self._inside)
            folder = name.rpartition("/")[0]
            while folder and f"{folder}/" not in self.stamps:  # not all folders have entries of their own
                self.stamps[f"{folder}/"] = ""
                folder = folder.rpartition("/")[0]
            if name and not name.endswith("/"):
                self.stamps[name] = f"{member.file_size} {member.CRC}"

    def read(self, name: str) -> bytes:
        """The content of a file. Raises ValueError where a zip is damaged there."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        try:
            with self._reading:
                return self._archive.read(self._inside + name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # Runtime: encrypted
            raise ValueError(f"{name} in the zip file {self.path} is not readable: {error}.") from error

    def pictures(self, folder: str = "") -> dict[str, list[Picture]]:
        """The pictures in each folder of a folder ("" or "name/") and in what lies deeper, in the order of names."""
        found: dict[str, list[Picture]] = {}
        for name in sorted(self.stamps):
            top, slash, rest = name.removeprefix(folder).partition("/")
            if name.startswith(folder) and slash:
                pictures = found.setdefault(top, [])
                if rest.lower().endswith(ENDINGS):
                    pictures.append(Picture(self, name))
        return found


class Picture(NamedTuple):
    """A picture in a folder or a zip."""

    files: Files
    name: str

    def __str__(self) -> str:
        path = self.files.path
        return str(path / self.name) if path.is_dir() else f"{self.name} in {path}"

    def read(self) -> bytes:
        """The content of its file."""
        return self.files.read(self.name)

    @property
    def stamp(self) -> str:
        """What changes when its file does, or gets another name."""
        return f"{self.name} {self.files.stamps[self.name]}"


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for at, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
        here = Path(at).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]  # nor to be walked
        for name in folders:
            yield f"{(here / name).as_posix()}/", ""
        for name in names:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                stat = os.stat(os.path.join(at, name))
                yield (here / name).as_posix(), f"{stat.st_size} {stat.st_mtime_ns}"
            else:
                yield (here / name).as_posix(), ""


def _fail(error: OSError) -> NoReturn:
    """A folder that cannot be read must not be taken for an empty one."""
    raise error


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX/")) or "/." in name
