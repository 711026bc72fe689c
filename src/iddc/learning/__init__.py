"""The one loop in which every method learns, and what makes it survive."""

from iddc.learning.loop import fit

__all__ = ["fit"]
