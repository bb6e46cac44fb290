"""When a plan that has lost nodes is ended."""

from covtanet.screening.node_watch import STANDS_STILL_S, StandStill


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
