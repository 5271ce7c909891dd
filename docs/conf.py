"""Sphinx configuration."""

import importlib
import inspect
import os
import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

project = "implicitdiff"
author = "the implicitdiff developers"
version = release = installed_version("implicitdiff")
root = Path(__file__).resolve().parents[1]
sys.path.append(str(root / "docs" / "_extensions"))

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "myst_nb",
    "gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute", "tables", "data/README.md"]
default_role = "code"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
os.environ["MATPLOTLIBRC"] = str(root / "docs" / "pages.mplstyle")  # of the kernels that execute the pages
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "furo"
html_title = "implicitdiff"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what overrides a documented method is not another thing to read about
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
autodoc_default_options = {
    # What the parts of the library say to each other.
    "exclude-members": "accepts, add, append, apply, begin, blocks, compressed, cut, diagonal_is_cheap, drift, end, "
    "estimated_distance, finish, first_product, from_entries, in_place, in_precision, is_preconditioned, lanczos, "
    "leave, leave_inverse, notes, of_one_operator, opened, preconditioned, run, scale, solves_on_support, system, "
    "tallies, traceable, uncompilable",
}

# The names of other projects that the pages mention stand in short inventories of their own, so that a build needs no
# network. A build fails for one that is not there.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.txt"),
    "scipy": ("https://docs.scipy.org/doc/scipy", "inventories/scipy.txt"),
}
nitpick_ignore_regex = [
    # Not public, of one solver alone, or short for a union in a signature that could not be evaluated.
    (r"py:.*", r"implicitdiff(\.\w+)*\._.*|.*State|.*ImplicitLayer|imaml\.config\..*|.*\.Source"),
    (r"py:class", r"ProcessGroup|Tensor|Examples|\w+SolverLike|_P|dict\[str"),
]

# [source] links: to the repository, where SOURCE_URL gives the address that its files have there, as in
# https://github.com/OWNER/implicitdiff/blob/main; to copies within the pages otherwise.
source_url = os.environ.get("SOURCE_URL")
extensions.append("sphinx.ext.linkcode" if source_url else "sphinx.ext.viewcode")


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The lines of the repository that define a name."""
    thing = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        thing = getattr(thing, name, None)
    try:
        thing = inspect.unwrap(thing)
        lines, first = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing)).resolve().relative_to(root)
    except (TypeError, ValueError):  # a constant, or nothing of ours
        return None
    return f"{source_url}/{path}#L{first}-L{first + len(lines) - 1}"


def _escape_shapes(app, what, name, obj, options, lines) -> None:
    """Shapes such as (*batch, n) are no emphasis, and absolute values no substitutions."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``)", line)  # every second one is a literal
            parts[::2] = [re.sub(r"(\(|, )(?=\*\*?\w)", r"\1\\", part).replace("|", r"\|") for part in parts[::2]]
            lines[i] = "".join(parts)


_attributes: dict[str, list[str]] = {}


def _set_aside(app, what, name, obj, options, lines) -> None:
    """napoleon would take what stands before a colon in the text of an attribute for its type."""
    if what in ("attribute", "property", "data"):
        _attributes[name] = list(lines)


def _put_back(app, what, name, obj, options, lines) -> None:
    lines[:] = _attributes.pop(name, lines)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _set_aside, priority=400)
    app.connect("autodoc-process-docstring", _put_back, priority=600)
    app.connect("autodoc-process-docstring", _escape_shapes, priority=700)
