"""Pseudonyms in place of identities, and the linkage file that holds both."""

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet.ledger.run import Run

IDENTITIES = ("source_uri", "study_uid", "series_uid")
# Plain digests of names and of content would link a row to its images, so they are replaced too.
HIDDEN = (*IDENTITIES, "source_version", "source_digest")
LINKAGE_SCHEMA = pa.schema([
    pa.field("series_key", pa.string(), nullable=False),
    *(pa.field(name, pa.string()) for name in IDENTITIES),
])  # fmt: skip


def hide_identities(run: Run, rows: pa.Table, linkage: pq.ParquetWriter) -> pa.Table:
    """Replace identities by pseudonyms and write both to the linkage file.

    Rows of a run that hides nothing pass unchanged.
    """
    if not run.site_key:
        return rows
    linkage.write_table(rows.select(LINKAGE_SCHEMA.names).cast(LINKAGE_SCHEMA))
    for name in HIDDEN:
        values = rows[name].to_pylist()
        hidden = [None if value is None else run.pseudonym(value) for value in values]
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(index), pa.array(hidden, pa.string()))
    return rows
