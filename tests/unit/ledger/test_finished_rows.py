"""Chunks of finished rows: when they are stored, and how they are found again."""

import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ledger_rows import freeze, record, series

from covtanet.ledger import finished_rows
from covtanet.ledger.batch import BatchRun, progress
from covtanet.ledger.finished_rows import FinishedRows, finished_keys, num_finished, store_rows
from covtanet.ledger.run import Run
from covtanet.ledger.series_keys import keys_of, position_of
from covtanet.ledger.work import unfinished_series


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> "Clock":
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


class Clock:
    now = 100.0


def chunks(run: Run) -> list[int]:
    folder = Path(run.work_uri("rows"))
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("*.parquet"))


def test_first_row_is_stored_at_once_and_the_others_every_two_seconds(
    run: Run, clock: Clock
) -> None:
    with closing(FinishedRows(run)) as finished:
        for name in "abc":
            finished.add(record(series(name)))
        assert chunks(run) == [1]
        clock.now += 2
        finished.add(record(series("d")))
        assert chunks(run) == [1, 3]
        finished.add(record(series("e")))
    assert chunks(run) == [1, 1, 3]
    assert num_finished(run.work_uri()) == 5


def test_chunk_of_most_rows_is_stored_before_its_time(
    run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished_rows, "MAX_ROWS_PER_CHUNK", 2)
    finished = FinishedRows(run)
    for name in "abcde":
        finished.add(record(series(name)))
    assert chunks(run) == [1, 2, 2]


def test_rows_in_hand_are_stored_when_the_run_fails(run: Run, clock: Clock) -> None:
    def fail() -> None:
        with closing(FinishedRows(run)) as finished:
            for name in "abc":
                finished.add(record(series(name)))
            raise RuntimeError("Ray failed")

    with pytest.raises(RuntimeError, match="Ray failed"):
        fail()
    assert num_finished(run.work_uri()) == 3


def test_progress_of_a_batch_never_exceeds_its_series(run: Run, tmp_path: Path) -> None:
    """Two drivers may have finished a series."""
    rows = freeze(run, tmp_path, "a", "b")
    batch = BatchRun(run_id=run.run_id, run_date=run.run_date, begun_at=datetime.now(UTC))
    assert progress(run.ledger, batch) == (2, 0)
    for _ in range(2):
        store_rows(run, [record(row) for row in rows])
    assert progress(run.ledger, batch) == (2, 2)


def test_half_written_chunk_does_not_count(run: Run) -> None:
    folder = Path(run.work_uri("rows"))
    folder.mkdir(parents=True)
    (folder / "._a-7.parquet").write_bytes(b"PAR1")
    assert num_finished(run.work_uri()) == 0
    assert len(finished_keys(run)) == 0


def test_remaining_series_are_those_without_a_row_in_the_manifests_order(
    run: Run, tmp_path: Path
) -> None:
    rows = freeze(run, tmp_path, *"abcde")
    store_rows(run, [record(rows[3]), record(rows[0])])
    finished = finished_keys(run)
    assert len(finished) == 2
    remaining = pa.concat_tables(unfinished_series(run, finished))["source_path"]
    assert remaining.to_pylist() == ["b.nii.gz", "c.nii.gz", "e.nii.gz"]
    everything = pa.concat_tables(unfinished_series(run, finished[:0]))
    assert everything.num_rows == 5


def test_position_of_a_key_is_its_index_or_minus_one() -> None:
    known = np.array([b"b", b"d", b"f"])
    wanted = np.array([b"a", b"b", b"c", b"f", b"g"])
    assert position_of(wanted, known).tolist() == [-1, 0, -1, 2, -1]
    assert position_of(wanted, known[:0]).tolist() == [-1] * 5


def test_series_key_that_would_be_cut_is_refused() -> None:
    table = pa.table({"series_key": ["k" * 33]})
    with pytest.raises(ValueError, match="more than 32 bytes"):
        keys_of(table)
