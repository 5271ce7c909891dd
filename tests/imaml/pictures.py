"""Pictures that the tests of the image data sets make, and can recognise."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

SHADES = 16
"""Between the marks of two classes, out of 255: JPEG keeps plain colours to within 2."""


def picture(klass: int, number: int, format: str = "PNG", size: tuple[int, int] = (20, 20)) -> bytes:
    """Plain: red tells the class, green the number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (SHADES * klass, SHADES * number, 128)).save(buffer, format)
    return buffer.getvalue()


def marks(images: Tensor) -> list[tuple[int, int]]:
    """The (class, number) of pictures (..., 3, side, side)."""
    middles = images.reshape(-1, *images.shape[-3:])[:, :2, images.shape[-2] // 2, images.shape[-1] // 2]
    return [(round(red * 255 / SHADES), round(green * 255 / SHADES)) for red, green in middles.tolist()]


def write(root: Path, files: dict[str, bytes], zipped: bool = False) -> Path:
    """The files as a folder, or as ROOT.zip with the folder in it."""
    if zipped:
        root.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
            for name, content in files.items():
                archive.writestr(f"{root.name}/{name}", content)
        return root.with_suffix(".zip")
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def classes(numbers: Iterable[int], pictures: int = 6, format: str = "PNG", at: str = "") -> dict[str, bytes]:
    """Files AT class_N/K.format, class N being of shade N."""
    return {f"{at}class_{c}/{k}.{format.lower()}": picture(c, k, format) for c in numbers for k in range(pictures)}
