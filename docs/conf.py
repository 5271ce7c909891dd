"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "implicitdiff"
author = "the implicitdiff developers"
version = release = installed_version("implicitdiff")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "myst_nb",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

html_theme = "furo"
html_title = "implicitdiff"
exclude_patterns = ["_build", "jupyter_execute", "tables"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
default_role = "code"
# Names that are not of this project stay plain text: the pages build without a network.
nitpick_ignore_regex = [(r"py:.*", r"(?!implicitdiff|imaml).*")]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def _escape_shapes(app, what, name, obj, options, lines) -> None:
    """Shapes such as (*batch, n) are no emphasis, and absolute values no substitutions."""
    for i, line in enumerate(lines):
        line = line.replace("(*batch", r"(\*batch").replace("(*args", r"(\*args").replace(", *", r", \*")
        is_code = "``" in line or line.lstrip().startswith((">>>", "..."))
        lines[i] = line if is_code else line.replace("|", r"\|")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _escape_shapes)
