"""From picture files to one tensor: decoded once, then mapped from a cache file."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .picture_files import Picture

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
CACHE_FORMAT = 1
"""To be raised when the same files shall give other pixels."""


class Preparation(NamedTuple):
    """From a picture to ``channels`` × ``side`` × ``side`` pixels: 1 channel is grey, 3 are red, green and blue.

    The shorter side is resized (bilinear, smoothed), the longer one cut around the centre. Photos are turned upright as
    their camera noted, transparent places are white. ``inverted`` makes dark bright: 1 for black ink, 0 for paper.

    >>> import io
    >>> from PIL import Image
    >>> Image.new("RGB", (30, 20), "red").save(file := io.BytesIO(), "PNG")
    >>> Preparation(channels=3, side=2)(file.getvalue(), "red.png").tolist()
    [[[255, 255], [255, 255]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    """

    channels: int
    side: int
    inverted: bool = False

    def __call__(self, content: bytes, name: str) -> np.ndarray:
        """The pixels, 0 to 255, of the content of a file. Raises ValueError for one that is no whole picture."""
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: half pictures would be taken for whole ones.")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as file:
                file.load()
                ImageOps.exif_transpose(file, in_place=True)
                image = _eight_bits(file).convert("L" if self.channels == 1 else "RGB")
            cut, width, height = min(image.size), *image.size
            left, top = (width - cut) / 2, (height - cut) / 2
            square = (left, top, left + cut, top + cut)
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR, square)
            pixels = np.asarray(image).reshape(self.side, self.side, self.channels)
        except Exception as error:  # PIL raises nearly all there are, from SyntaxError to struct.error
            raise ValueError(
                f"{name} is not a readable picture ({error}): replace it by a whole {', '.join(FORMATS)} file, or "
                f"remove it."
            ) from error
        pixels = pixels.transpose(2, 0, 1)
        return 255 - pixels if self.inverted else pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    """What PIL converts as one expects: grey of 16 bits would be cut at 255, transparent places would get a colour."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def load(pictures: Sequence[Picture], preparation: Preparation, kind: str, data: Path) -> Tensor:
    """All pictures, uint8 of shape (pictures, channels, side, side), decoded or mapped from the cache.

    The cache is one file in ``$XDG_CACHE_HOME`` or ``~/.cache`` for each ``kind`` of ``data`` and preparation. It is
    made again when a picture's name, size or time (in a zip: checksum) has changed, and when it is damaged.
    """
    parts = [f"{CACHE_FORMAT} {preparation}", *(picture.stamp for picture in pictures)]
    key = hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imaml"
    where = hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]
    place = folder / f"{kind}_{preparation.channels}x{preparation.side}_{where}.pt"
    images = _read(place, key)
    if images is None:
        with _one_at_a_time(place):  # of several ranks one decodes
            images = _read(place, key)
            if images is None:
                images = _decode(pictures, preparation)
                if _write(place, key, images):
                    mapped = _read(place, key)  # shared by the ranks, and not all of it in memory
                    images = images if mapped is None else mapped
    return images


def _decode(pictures: Sequence[Picture], preparation: Preparation) -> Tensor:
    """In threads: PIL lets go of the interpreter while it decodes, and a thread writes to its place in the result.

    Processes would have to be started under the feet of torch's own threads and of torchrun, and send all pixels over.
    """
    shape = (len(pictures), preparation.channels, preparation.side, preparation.side)
    images = torch.empty(shape, dtype=torch.uint8)
    pixels = images.numpy()

    def decode(i: int) -> None:
        pixels[i] = preparation(pictures[i].read(), str(pictures[i]))

    with ThreadPoolExecutor() as workers:
        for _ in track(
            workers.map(decode, range(len(pictures))),
            "decoding pictures, once",
            total=len(pictures),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        ):
            pass
    return images


def _read(place: Path, key: str) -> Tensor | None:
    """What the cache file holds, or None where there is none, or one of other pictures, or a damaged one."""
    try:
        cached = torch.load(place, weights_only=True, mmap=True)
        images = cached["images"]
        return images if cached["key"] == key and cached["checksum"] == _checksum(images) else None
    except Exception:  # whatever is wrong with a cache, the data is the remedy
        return None


def _write(place: Path, key: str, images: Tensor) -> bool:
    """Whether the images could be cached. A machine that stops before they are on the disk leaves a wrong checksum."""
    written = place.with_suffix(f".{os.getpid()}.writing")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for leftover in place.parent.glob(f"{place.stem}.*.writing"):
            leftover.unlink(missing_ok=True)
        torch.save({"key": key, "checksum": _checksum(images), "images": images}, written)
        os.replace(written, place)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's word for a full disk
        with suppress(OSError):
            written.unlink()
        warnings.warn(f"the decoded pictures could not be cached in {place.parent}: {error}", stacklevel=2)
        return False
    return True


def _checksum(images: Tensor) -> int:
    return zlib.crc32(images.numpy())


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Wait for other processes that are about the same file; the system releases what a killed one held."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_suffix(".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # a cache is a convenience
        yield
        return
    with lock:
        yield
