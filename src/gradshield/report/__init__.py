"""One self-contained HTML file that shows what a scan found, why, and whether to trust it.

``write(ReportData(...), "report.html")``. Row text is untrusted and only ever text. No torch here.
"""

from gradshield.report.data import Agreement, Arm, Check, Counts, Piece, QuarantinedView, RateLike, ReportData, RowView
from gradshield.report.page import render, write

__all__ = [
    "Agreement",
    "Arm",
    "Check",
    "Counts",
    "Piece",
    "QuarantinedView",
    "RateLike",
    "ReportData",
    "RowView",
    "render",
    "write",
]
