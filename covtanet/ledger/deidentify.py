"""Pseudonyms in place of identities, and the linkage file that holds both."""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet.ledger.run import Run
from covtanet.ledger.work import batched

ROWS_PER_GROUP = 1024
IDENTITIES = ("source_uri", "study_uid", "series_uid")
# Plain digests of names and of content would link a row to its images, so they are replaced too.
HIDDEN = (*IDENTITIES, "source_version", "source_digest")
LINKAGE_SCHEMA = pa.schema([
    pa.field("series_key", pa.string(), nullable=False),
    *(pa.field(name, pa.string()) for name in IDENTITIES),
])  # fmt: skip


def hide_identities(
    run: Run, rows: Iterable[dict[str, Any]], linkage: pq.ParquetWriter
) -> Iterator[dict[str, Any]]:
    """Replace identities by pseudonyms and write both to the linkage file.

    Rows of a run that hides nothing pass unchanged.
    """
    for group in batched(rows, ROWS_PER_GROUP):
        if run.site_key:
            linkage.write_table(pa.Table.from_pylist(group, schema=LINKAGE_SCHEMA))
        for row in group:
            hidden = {name: run.pseudonym(row[name]) for name in HIDDEN if row[name] is not None}
            yield {**row, **hidden}
