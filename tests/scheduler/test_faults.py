"""A short share of the fault campaign of `make soak`: a full disk, the actor and an agent killed."""

from __future__ import annotations

import pytest

from bench.scheduler import faults
from tests.scheduler.conftest import RayHead

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_nothing_acknowledged_is_lost_whatever_fails(ray_head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "ENGINES", 2)
    campaign = faults.Campaign(ray_head, seed=0, recovery_limit_s=120.0)  # others may need the cores too
    try:
        campaign.start()
        for fault in ("disk", "actor", "agent"):
            monkeypatch.setattr(faults, "FAULTS", (fault,))
            campaign.run(1)
    finally:
        campaign.end()
    assert campaign.seen == {"disk": 1, "actor": 1, "agent": 1} and campaign.changes >= 4
