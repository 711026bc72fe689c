"""The one loop in which every method learns, and what makes it survive."""

from iddc.learning.loop import fit, trained_run

__all__ = ["fit", "trained_run"]
