"""Saving pictures without a screen."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

subplots = plt.subplots


def save(figure: Figure, path: Path) -> Path:
    """Write the picture, and close it."""
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
