"""``python -m implicitdiff.profile script.py``: run a program, and print where its implicit layers spend their time."""

from __future__ import annotations

import os
import runpy
import sys

from ..profile import Profile


def main() -> None:
    """Run what the command line names as the main program; the table comes also where it ends in an error."""
    is_module, arguments = sys.argv[1:2] == ["-m"], sys.argv[1:]
    arguments = arguments[1:] if is_module else arguments
    if not arguments:
        sys.exit("usage: python -m implicitdiff.profile (script.py | -m module) [arguments of the program]")
    sys.argv = arguments
    profile = Profile()
    try:
        with profile:
            if is_module:
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))  # as Python itself has it for a script
                runpy.run_path(arguments[0], run_name="__main__")
    finally:
        print(profile)


if __name__ == "__main__":
    main()
