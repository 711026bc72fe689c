"""Training: the loop, and what makes it survive."""

from iddc.training.loop import fit

__all__ = ["fit"]
