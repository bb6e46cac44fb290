"""The soak itself: one undisturbed night, and one under two faults."""

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest

from benchmarks.soak.__main__ import soak
from benchmarks.soak.disturbances import DRIVER, Disturbance
from benchmarks.soak.faulty_store import StoreFault

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

NIGHT = date(2026, 11, 23)


def test_soak_continues_disturbed_night_to_the_right_ledger(
    tmp_path: Path, seen: Callable[[str], None]
) -> None:
    with soak(tmp_path / "soak", seed=0, num_sound=2) as running:
        running.archive.fill()
        clean = running.run(NIGHT, [])
        assert (clean.codes, clean.faults) == ((0,), ())
        running.archive.pass_a_day()
        faults = [
            Disturbance(kind=StoreFault.BUSY, mark="run ", hold_s=20),
            Disturbance(kind=DRIVER, mark="screening ", delay_s=1),
        ]
        disturbed = running.run(NIGHT + timedelta(days=1), faults)
    assert disturbed.disturbances == (StoreFault.BUSY, DRIVER)
    assert disturbed.codes == (-9, 0)
    assert disturbed.faults == ()
    assert disturbed.num_rows == len(running.archive.fresh)
    seen(f"{clean.num_rows} rows; driver killed, then {disturbed.num_rows} rows, all right")
