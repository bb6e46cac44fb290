"""When a plan that has lost nodes is ended."""

from covtanet.screening.node_watch import STANDS_STILL_S, StandStill, has_room


def test_plan_without_a_lost_node_may_stand_still() -> None:
    stand_still = StandStill({"a"}, 0)
    assert not stand_still.lasts({"a"}, 5, 10)
    assert not stand_still.lasts({"a", "b"}, 5, 10 * STANDS_STILL_S)


def test_plan_that_moves_goes_on_without_a_lost_node() -> None:
    stand_still = StandStill({"a", "b"}, 0)
    for number in range(1, 9):
        assert not stand_still.lasts({"a"}, number, number * STANDS_STILL_S)


def test_plan_that_lost_a_node_and_stands_still_is_ended() -> None:
    stand_still = StandStill({"a"}, 0)
    # It joined later.
    assert not stand_still.lasts({"a", "b"}, 3, 100)
    assert not stand_still.lasts({"a"}, 3, 110)
    assert not stand_still.lasts({"a"}, 3, 99 + STANDS_STILL_S)
    # A node that joins does not bring back what stands still.
    assert stand_still.lasts({"a", "c"}, 3, 100 + STANDS_STILL_S)
    assert stand_still.nodes == {"a", "b"}


def test_plan_that_goes_on_with_a_replaced_node_may_stand_still_later() -> None:
    """As with one slow series at its end."""
    stand_still = StandStill({"a", "b"}, 0)
    assert not stand_still.lasts({"a", "c"}, 0, 10)
    assert not stand_still.lasts({"a", "c"}, 1, 20)
    assert not stand_still.lasts({"a", "c"}, 1, 20 + 2 * STANDS_STILL_S)


def test_new_plan_needs_room_for_every_stage() -> None:
    assert has_room([3], 0, needs_gpu=False)
    assert not has_room([2], 0, needs_gpu=False)
    assert not has_room([2, 1], 0, needs_gpu=False)


def test_screening_that_began_on_gpus_is_never_planned_anew_on_cpus() -> None:
    assert not has_room([16], 0, needs_gpu=True)
    assert has_room([16], 1, needs_gpu=True)
