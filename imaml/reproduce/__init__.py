"""The paper's table 1 and figure 2, measured again: each file here is one command, ``imaml reproduce NAME``.

Each writes its data and a picture, prints what it found, and raises :class:`ClaimError` where a claim of the paper does
not hold in it.
"""

from .claims import Claim, ClaimError

__all__ = ["Claim", "ClaimError"]
