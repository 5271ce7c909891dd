"""``python -m imaml``."""

from .cli import main

main()
