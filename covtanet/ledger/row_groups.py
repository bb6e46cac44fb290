"""Local Parquet files whose row groups are of like size, however few rows come at a time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# A writer keeps 20 KB for each row group until its file ends: a million series in groups of 64 took
# 360 MB, measured. A row of a manifest lists the objects of its series, up to some hundreds.
ITEMS_PER_GROUP = 1 << 14


class RowGroupWriter:
    """A writer of tables to a local file, which joins small ones to one row group.

    Used within ``contextlib.closing``. A row counts as many items as it lists objects, at least
    one: so that a group of series with many objects takes no more memory.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._tables: list[pa.Table] = []
        self._num_items = 0

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        # A table takes 10 KB even without rows: of a million finished series, 200 MB in all.
        if not table.num_rows:
            return
        self._tables.append(table)
        self._num_items += _count_items(table)
        if self._num_items >= ITEMS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables = []
        self._num_items = 0

    def close(self) -> None:
        """Write the rows that are left, and the end of the file."""
        self._write_group()
        self._writer.close()


def _count_items(table: pa.Table) -> int:
    if "objects" not in table.column_names:
        return int(table.num_rows)
    num_objects = pc.sum(pc.list_value_length(table["objects"])).as_py() or 0
    return max(int(table.num_rows), int(num_objects))
