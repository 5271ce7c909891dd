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
    """The entries of all autosummary tables, and the aliases of types, which have no docstrings to be taken from."""
    names = []
    for page in sorted(PAGES.glob("*.md")):
        for block in re.findall(r"```\{eval-rst\}\n(\.\. currentmodule.*?)```", page.read_text(), re.DOTALL):
            module = re.match(r"\.\. currentmodule:: (\S+)", block)[1]  # type: ignore[index]
            entries = re.findall(r"^(?:   |\.\. py:data:: )([\w.]+)$", block, re.MULTILINE)
            names += [f"{module}.{entry}" for entry in entries]
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
    things = {name: thing_of(name) for name in LISTED}
    return [
        n for n, thing in things.items() if thing is not Any and (inspect.isclass(thing) or inspect.isroutine(thing))
    ]


def text_of(name: str) -> str:
    return inspect.cleandoc(thing_of(name).__doc__ or "")


SHAPE = re.compile(r"\(\*batch|\((?:tasks|examples|batch), |\b(?:shape|tree)s?\b", re.IGNORECASE)
FAILURE = re.compile(r"\b[Rr]aises?\b(?!\")|\bis raised\b|\b[Ee]rrors\b[^.]*\b(?:those of|included)\b")
SOURCE = re.compile(r"\b(?:19|20)\d\d\b|(?:class|func):`[^`]*(?:QPLayer|transport_polytope)`")
ABBREVIATED = re.compile(r"\b(?:Alg|Ch|Eq|Fig|No|Sec|Thm|Vol|approx|cf|p|pp|resp)\.\s")
"""A table of the pages shows the first sentence, which it takes to end at the first full stop, but for "et al."."""

RECORDS = {  # what is returned, not called; the shapes of its fields stand with them
    *("implicitdiff.Status", "implicitdiff.SolveInfo", "implicitdiff.Solution", "implicitdiff.LinearSolution"),
    *("implicitdiff.info.RecordedSolve", "implicitdiff.checks.CheckReport", "implicitdiff.testing.LinearSolverReport"),
    *("implicitdiff.profile.Profile", "implicitdiff.profile.Solves", "implicitdiff.profile.Timed"),
    *("imaml.MetaLoss", "imaml.adapt.Prediction"),
}
WITHOUT_TENSORS = {  # numbers, names, files and other objects
    *("implicitdiff.bilevel.decreasing", "implicitdiff.record", "implicitdiff.testing.check_linear_solver"),
    *("imaml.training.train", "imaml.training.evaluate", "imaml.config.Config", "imaml.tasks.image_folder.divide"),
    *("imaml.adapt.adapt", "imaml.adapt.confusion", "imaml.adapt.write_predictions"),
}
WITHOUT_FAILURES = {"implicitdiff.record", "imaml.adapt.confusion"}

ALGORITHMS = (  # modules of methods that somebody has published
    *("implicitdiff.inner_solvers", "implicitdiff.linear_solvers", "implicitdiff.preconditioners"),
    *("implicitdiff.layers.quadratic_program", "implicitdiff.layers.sinkhorn", "implicitdiff.layers.deq"),
    *("implicitdiff.projections.affine", "implicitdiff.projections.box_section", "implicitdiff.projections.kl"),
    *("implicitdiff.projections.polyhedron", "implicitdiff.projections.simplices", "imaml.learners"),
    *("implicitdiff.projections.transport", "implicitdiff._cone_projections", "implicitdiff._exponential_cone"),
)
WITHOUT_SOURCE = {
    *("LinearSolver", "IterativeLinearSolver", "System", "InnerSolver", "InnerProblem"),  # what methods have in common
    *("Learner", "MetaLoss"),
    *("TorchOptimizer", "SciPyMinimize", "SciPyRoot", "SciPy"),  # another library's methods
    "Auto",  # a choice among other solvers
    *("hyperplane", "half_space"),  # one line of algebra, which is there
    "LearnedRegularization",  # a logarithm
}


def is_error(name: str) -> bool:
    return inspect.isclass(thing_of(name)) and issubclass(thing_of(name), Exception)


@pytest.mark.parametrize("name", documented())
def test_a_docstring_says_what_a_reader_looks_for(name: str) -> None:
    text = text_of(name)
    assert re.search(r"^>>> ", text, re.MULTILINE), f"{name} has no example"
    assert "doctest: +SKIP" not in text, f"{name} has an example that is not run"
    if not is_error(name) and name not in RECORDS:
        assert name in WITHOUT_TENSORS or SHAPE.search(text), f"{name} says nothing of shapes"
        assert name in WITHOUT_FAILURES or FAILURE.search(text), f"{name} does not say what it raises"
    if thing_of(name).__module__.startswith(ALGORITHMS) and name.rpartition(".")[2] not in WITHOUT_SOURCE:
        assert SOURCE.search(text), f"{name} names no source"


@pytest.mark.parametrize("name", documented())
def test_a_first_sentence_stands_alone(name: str) -> None:
    paragraph = text_of(name).split("\n\n")[0].replace("\n", " ").replace("et al.", "et al")
    assert not ABBREVIATED.search(paragraph), f"{name}: the first sentence is cut short in tables"
    sentence = re.split(r"\.\s", paragraph)[0]
    assert sentence.count("(") == sentence.count(")"), f"{name}: the first sentence is cut short: {sentence}"


def test_the_exceptions_to_these_rules_are_needed() -> None:
    names = documented()
    assert not (RECORDS | WITHOUT_TENSORS | WITHOUT_FAILURES) - {*names}
    assert not WITHOUT_SOURCE - {name.rpartition(".")[2] for name in names}
    assert not [name for name in WITHOUT_TENSORS if SHAPE.search(text_of(name))]
    assert not [name for name in WITHOUT_FAILURES if FAILURE.search(text_of(name))]
