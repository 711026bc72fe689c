"""A backbone of one's own, learned from unlabelled images without any label."""

from iddc.pretraining.folder import write_scores
from iddc.pretraining.loop import pretrain

__all__ = ["pretrain", "write_scores"]
