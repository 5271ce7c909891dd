"""All comparisons, into docs/tables/peers.json and peers.md: ``python -m benchmarks.peers [--cpu-time]``."""

from __future__ import annotations

import json
import os
import platform
import warnings
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import fixed_point, hypergradient, ridge
from .timing import CPU_TIME, Row

TABLES = Path(__file__).parents[2] / "docs" / "tables"
PACKAGES = (
    *("torch", "jax", "betty-ml", "jaxopt", "linear_operator", "lineax"),
    *("optimistix", "qpth", "torchdeq", "torchopt"),
)


def main() -> None:
    warnings.simplefilter("ignore")
    about = {
        "date": date.today().isoformat(),
        "clock": "processor time" if CPU_TIME else "wall clock",
        "threads": 1,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
    }
    TABLES.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for workload in (hypergradient, ridge, fixed_point):
        rows += workload.main()
        table = {**about, "rows": [asdict(row) for row in rows]}
        (TABLES / "peers.json").write_text(json.dumps(table, indent=1) + "\n")
        (TABLES / "peers.md").write_text(markdown(rows, about))


def markdown(rows: list[Row], about: dict[str, object]) -> str:
    """A table for each workload, the fastest way first."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())  # type: ignore[attr-defined]
    parts = [f"{about['date']}, one thread of {about['machine']}, {about['clock']}: {versions}.\n"]
    for workload in dict.fromkeys(row.workload for row in rows):
        parts.append(f"\n**{workload}**\n\n| | ratio | ms | relative error of the gradient |\n|---|---|---|---|\n")
        of_it = [row for row in rows if row.workload == workload]
        for row in sorted(of_it, key=lambda row: (row.seconds is None, row.seconds)):
            name = f"**{row.way}**" if row.way.startswith("implicitdiff") else row.way
            error = "" if row.error is None else f"{row.error:.0e}"
            if row.seconds is None or row.ratio is None:
                parts.append(f"| {name} | not timed | | {error} |\n")
            else:
                parts.append(f"| {name} | {row.ratio:.2f} | {milliseconds(row.seconds)} | {error} |\n")
    return "".join(parts)


def milliseconds(seconds: float) -> str:
    """Three digits, and never an exponent."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
