"""Settings switch on all ranks at one step, or on none."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from llep.config import Settings
from llep.messages import PROTOCOL, Directive, PlacementOrder, RecordingOrder, decode_directive, encode
from llep.moe.agreement import AgreedSettings, RanksDisagree, Revision, agreed_step
from llep.moe.replicas import BadPlacement


def directive(revision: int, **settings: object) -> Directive:
    return Directive(protocol=PROTOCOL, engine="e", revision=revision, settings=dict(settings))


def run_step(ranks: list[AgreedSettings], step: int, tokens: int = 1) -> None:
    headers = np.stack([rank.header(step, tokens, is_dummy=False, is_prefill=True) for rank in ranks])
    for rank in ranks:
        rank.agree(headers)


def test_a_revision_goes_live_when_the_last_rank_has_it() -> None:
    ranks = [AgreedSettings(Settings()) for _ in range(3)]
    for rank in ranks[:2]:
        rank.offer(directive(4, imbalance_threshold=2.0))
    run_step(ranks, 1)
    assert [rank.live.number for rank in ranks] == [0, 0, 0]
    ranks[2].offer(directive(4, imbalance_threshold=2.0))
    run_step(ranks, 2)
    assert [rank.live.number for rank in ranks] == [4, 4, 4]
    assert {rank.live.settings.imbalance_threshold for rank in ranks} == {2.0}
    assert {rank.live_since_step for rank in ranks} == {2}


def test_a_revision_that_arrives_while_ranks_agree_waits_for_the_next_step() -> None:
    ranks = [AgreedSettings(Settings()) for _ in range(2)]
    for rank in ranks:
        rank.offer(directive(1, imbalance_threshold=2.0))
    headers = np.stack([rank.header(1, 1, is_dummy=False, is_prefill=False) for rank in ranks])
    ranks[0].offer(directive(2, imbalance_threshold=3.0))  # after the header, before the switch
    for rank in ranks:
        rank.agree(headers)
    assert [rank.live.settings.imbalance_threshold for rank in ranks] == [2.0, 2.0]


def test_no_step_runs_with_two_revisions_whatever_arrives_when() -> None:
    rng = random.Random(1)
    ranks = [AgreedSettings(Settings()) for _ in range(4)]
    newest = 0
    for step in range(1, 3000):
        if rng.random() < 0.3:
            newest += 1
        for rank in ranks:
            if rng.random() < 0.4:
                rank.offer(directive(rng.randint(0, newest), min_chunk_tokens=1 + newest % 100))
        if rng.random() < 0.2:
            for rank in ranks:  # offers with one content for one number, as the scheduler makes them
                rank.offer(directive(newest + 1, min_chunk_tokens=1 + newest % 100))
            newest += 1
        try:
            run_step(ranks, step)
        except RanksDisagree:
            ranks = [AgreedSettings(Settings()) for _ in range(4)]
        assert len({(rank.live.number, rank.live.settings) for rank in ranks}) == 1


def test_ranks_started_with_other_settings_stop_loudly_and_alike() -> None:
    ranks = [AgreedSettings(Settings()), AgreedSettings(Settings(imbalance_threshold=1.5))]
    headers = np.stack([rank.header(1, 1, is_dummy=False, is_prefill=False) for rank in ranks])
    for rank in ranks:
        with pytest.raises(RanksDisagree, match="EP rank 1 holds other settings than rank 0 under revision 0"):
            rank.agree(headers)


def test_an_invalid_or_older_directive_changes_nothing() -> None:
    rank = AgreedSettings(Settings())
    rank.offer(directive(3, imbalance_threshold=1.7))
    rank.offer(directive(2, imbalance_threshold=9.0))
    rank.offer(directive(4, imbalance_threshold=0.2))
    assert rank.held.number == 3
    assert rank.last_error.startswith("revision 4: imbalance_threshold=0.2 is not valid")


def test_cold_settings_stay_as_they_were_at_start() -> None:
    rank = AgreedSettings(Settings(slots_per_rank=2))
    rank.offer(directive(1, slots_per_rank=8, imbalance_threshold=1.1))
    assert (rank.held.settings.slots_per_rank, rank.held.settings.imbalance_threshold) == (2, 1.1)


def test_a_revision_is_settings_placement_and_recording_and_its_digest_covers_them() -> None:
    placement = PlacementOrder(2, ((0, 3, 1),), 1000)
    recording = RecordingOrder("r", 1e9, 10, 1 << 20)
    told = msgspec.structs.replace(directive(2), placement=placement, recording=recording)
    rank = AgreedSettings(Settings())
    rank.offer(decode_directive(encode(told)))
    run_step([rank], 1)
    assert (rank.live.number, rank.live.placement, rank.live.recording) == (2, placement, recording)
    others = [
        Revision(2, Settings(), placement, recording),
        Revision(2, Settings(), None, recording),
        Revision(2, Settings(), placement, None),
        Revision(2, Settings(), PlacementOrder(2, ((0, 3, 0),), 1000), recording),
        Revision(2, Settings(imbalance_threshold=2), placement, recording),
    ]
    assert len({other.digest for other in others}) == len(others) and others[0].digest == rank.live.digest


def test_a_placement_that_cannot_be_followed_is_refused_and_the_last_good_revision_stays() -> None:
    def refuse(order: PlacementOrder) -> None:
        if order.number == 3:
            raise BadPlacement("placement 3: unknown rank 9")

    rank = AgreedSettings(Settings(), refuse)
    rank.offer(directive(2, imbalance_threshold=1.7))
    bad = msgspec.structs.replace(directive(3), placement=PlacementOrder(3, ((0, 0, 9),), 1))
    rank.offer(bad)
    assert rank.held.number == 2 and rank.held.settings.imbalance_threshold == 1.7
    assert rank.last_error == "revision 3: placement 3: unknown rank 9"
    rank.offer(directive(4))
    assert rank.held.number == 4 and rank.last_error == ""


@pytest.mark.parametrize(
    ("is_replicated", "dummies", "expected"),
    [(True, (False, False), (7, True)), (False, (False, False), (14, True)), (False, (False, True), (7, True))]
    + [(False, (True, True), (14, False)), (True, (True, True), (7, False))],
)
def test_a_step_is_real_and_counts_real_tokens(
    is_replicated: bool, dummies: tuple[bool, bool], expected: tuple[int, bool]
) -> None:
    ranks = [AgreedSettings(Settings()) for _ in dummies]
    headers = np.stack(
        [rank.header(1, 7, is_dummy=is_dummy, is_prefill=False) for rank, is_dummy in zip(ranks, dummies, strict=True)]
    )
    step, is_real = agreed_step(headers, is_replicated=is_replicated)
    assert (step.tokens, is_real) == expected
    assert step.phase == "decode"
