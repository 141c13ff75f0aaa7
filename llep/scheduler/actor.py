"""The Scheduler: hears every engine's reports, keeps the settings people ask for, and answers what people ask.

A plain class over asyncio that Ray runs as a detached, named actor; nothing in here names Ray. What must last is in the
store before it is acknowledged; the rest comes back by itself with the engines' next reports.
"""

from __future__ import annotations

from llep.scheduler.changes import Changes
from llep.scheduler.questions import Questions
from llep.scheduler.recordings import Recordings
from llep.scheduler.reports import Reports
from llep.scheduler.steering import Steering


class Scheduler(Reports, Changes, Questions, Steering, Recordings):
    """All methods take and return bytes or plain JSON values; times are unix times in seconds."""
