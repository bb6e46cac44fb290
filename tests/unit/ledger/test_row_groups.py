"""Row groups of like size, whatever comes at a time."""

from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covtanet.ledger import row_groups
from covtanet.ledger.row_groups import RowGroupWriter

SCHEMA = pa.schema([("key", pa.int64()), ("objects", pa.list_(pa.int64()))])


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "ITEMS_PER_GROUP", 6)


def group_sizes(path: Path) -> list[int]:
    metadata = pq.ParquetFile(path).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def write(path: Path, *objects_of_rows: list[int]) -> None:
    with closing(RowGroupWriter(path, SCHEMA)) as writer:
        for key, objects in enumerate(objects_of_rows):
            writer.write(pa.Table.from_pylist([{"key": key, "objects": objects}], schema=SCHEMA))


def test_small_tables_share_a_group_and_none_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "a", *([1] for _ in range(8)))
    assert group_sizes(tmp_path / "a") == [6, 2]
    assert pq.read_table(tmp_path / "a")["key"].to_pylist() == list(range(8))


def test_rows_of_many_objects_make_smaller_groups(tmp_path: Path) -> None:
    write(tmp_path / "a", [1, 2, 3], [4, 5, 6], [7] * 9, [], [1])
    assert group_sizes(tmp_path / "a") == [2, 1, 2]


def test_nothing_written_is_a_file_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert pq.read_table(tmp_path / "a").schema.equals(SCHEMA)


def test_tables_without_rows_are_not_kept(tmp_path: Path) -> None:
    """Those of a million finished series took 200 MB."""
    with closing(RowGroupWriter(tmp_path / "a", SCHEMA)) as writer:
        for _ in range(3):
            writer.write(SCHEMA.empty_table())
        assert not writer._tables
    assert pq.read_table(tmp_path / "a").schema.equals(SCHEMA)
