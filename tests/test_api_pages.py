"""The API pages: each public name stands on one of them once, and says what a reader looks for."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import imaml.tasks
import implicitdiff as idf

PAGES = Path(__file__).parents[1] / "docs" / "api"
MODULES = [
    idf,
    *(thing for name in idf.__all__ if inspect.ismodule(thing := getattr(idf, name))),
    *(imaml, imaml.tasks),
    *map(importlib.import_module, ("imaml.adapt", "imaml.models", "imaml.training")),
]
ELSEWHERE = {  # what public functions return, take or raise, in modules that are not public as a whole
    *("implicitdiff.checks.CheckReport", "implicitdiff.info.RecordedSolve"),
    *("imaml.config.Config", "imaml.distributed.LostRankError", "imaml.tasks.image_folder.divide"),
}


def public_names(module: ModuleType) -> list[str]:
    """What the module exports; what it defines under a public name, where it has no ``__all__``."""
    defined = [n for n, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [n for n in defined if n[0] != "_"])
    return [f"{module.__name__}.{n}" for n in names if not inspect.ismodule(getattr(module, n))]


def thing_of(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def listed_names() -> list[str]:
    """The entries of all autosummary tables."""
    names = []
    for page in sorted(PAGES.glob("*.md")):
        for block in re.findall(r"```\{eval-rst\}\n(\.\. currentmodule.*?)```", page.read_text(), re.DOTALL):
            module = re.match(r"\.\. currentmodule:: (\S+)", block)[1]  # type: ignore[index]
            names += [f"{module}.{entry}" for entry in re.findall(r"^   ([\w.]+)$", block, re.MULTILINE)]
    return names


LISTED = listed_names()


def test_every_public_name_stands_on_one_page_once() -> None:
    # By what a name stands for, as solvers and conditions have a second, shorter one.
    public = {id(thing_of(name)): name for module in MODULES[::-1] for name in public_names(module)}
    public |= {id(thing_of(name)): name for name in ELSEWHERE}
    listed = Counter(id(thing_of(name)) for name in LISTED)
    assert not [name for key, name in public.items() if key not in listed], "missing in docs/api"
    assert not [name for name in LISTED if id(thing_of(name)) not in public], "in docs/api, but not public"
    assert not [public[key] for key, count in listed.items() if count > 1], "more than once in docs/api"


def documented() -> list[str]:
    return [name for name in LISTED if inspect.isclass(thing_of(name)) or inspect.isfunction(thing_of(name))]


@pytest.mark.parametrize("name", documented())
def test_a_name_has_an_example_and_says_how_it_fails(name: str) -> None:
    text = thing_of(name).__doc__ or ""
    assert ">>>" in text, f"{name} has no example"
