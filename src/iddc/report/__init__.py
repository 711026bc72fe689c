"""A run as one HTML file that works from disk: what it learned, with pictures and numbers.

Everything is inside: pictures as data, charts as SVG, style and script. The page's own policy lets
it fetch nothing. Names are escaped wherever they stand.
"""

from iddc.report.verdict import Finding, Verdict
from iddc.report.writing import REPORT, judge_run, write_report

__all__ = ["REPORT", "Finding", "Verdict", "judge_run", "write_report"]
