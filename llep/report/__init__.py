"""What a recording says, as one page: is lending worth it, with which settings, on how many ranks, and why."""

from llep.report.findings import Findings, analyse
from llep.report.page import page

__all__ = ["Findings", "analyse", "page"]
