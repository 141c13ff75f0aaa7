"""Property tests try the same cases each time, so that main stays green, and take the time that a busy machine takes;
HYPOTHESIS_PROFILE=default tries others."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
