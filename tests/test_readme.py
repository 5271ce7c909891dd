"""The Python examples of the README and of the first page on implicit MAML run as they stand; links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{page}-{i}")
    for page in ("README.md", "docs/imaml/index.md")
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


def test_the_pages_have_examples() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block: str) -> None:
    exec(compile(block, "example", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_comparison_is_that_of_the_benchmark() -> None:
    assert (ROOT / "docs" / "tables" / "capabilities.md").read_text() in (ROOT / "README.md").read_text()


SCRIPTS = dict(
    re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "docs/howto/distributed.md").read_text(), re.DOTALL)
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_for_several_processes_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SCRIPTS[name])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name]
    subprocess.run(torchrun, cwd=tmp_path, check=True, timeout=300)
