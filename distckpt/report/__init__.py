"""The report: a run as one page of HTML that needs nothing but itself.

Data goes one way: `records` (what the local logs say) and the inventory of checkpoints, `facts` (what happened, as
plain data), `figures` and `tables` (how it looks), `page` (one text).
Invariant: whatever a checkpoint or a log says stands in the page as text or as a number, never as markup or script,
and the page asks no server for anything.
"""

from __future__ import annotations

from distckpt.report.facts import Facts, gather
from distckpt.report.page import render
from distckpt.report.records import Logs, read_logs

__all__ = ["Facts", "Logs", "gather", "read_logs", "render"]
