"""What is installed is complete: the packages, their types, the files that they read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_has_every_module_the_types_and_the_splits(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for package in ("implicitdiff", "imaml"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(pip, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    sources = (path for package in ("implicitdiff", "imaml") for path in (source / package).rglob("*.*"))
    files = {str(path.relative_to(source)) for path in sources if path.is_file()}
    assert files <= packed
    assert {"implicitdiff/py.typed", "imaml/py.typed"} <= packed

    user = tmp_path / "user.py"
    user.write_text("import implicitdiff as idf\n\nreveal_type(idf.CG(rtol=1e-8).rtol)\n")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(user)]
    env = {"MYPYPATH": str(tmp_path / "installed"), "PATH": ""}
    told = subprocess.run(mypy, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert 'Revealed type is "float"' in told.stdout.replace("builtins.", ""), told.stdout + told.stderr
