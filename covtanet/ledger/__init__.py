"""The ledger: one Parquet file for each committed run, and the work in progress that leads to it.

LEDGER/date=YYYY-MM-DD/<run_id>.parquet   a committed run, published by one PUT
LEDGER/_work/<run_id>/run.json            description of the run
LEDGER/_work/<run_id>/manifest.parquet    its series, frozen
LEDGER/_work/<run_id>/ignored.parquet     objects that belong to no series
LEDGER/_work/<run_id>/folders.parquet     every folder as listed: the next night reads only changes
LEDGER/_work/<run_id>/drivers/, model/    files for the workers; removed after the commit
LEDGER/_work/<run_id>/attempts/<driver>/   series whose workers died; removed after the commit
LEDGER/_work/<run_id>/rows/                rows of finished series, in chunks; removed likewise
LEDGER/_batches/<batch_id>.run            the run that a batch of the endpoint started

A run that hides identities has its ``_work`` under the linkage prefix instead, which may hold
identities.

The driver writes a chunk of rows every two seconds. The remaining series are those of the manifest
without a row in a chunk. Readers of Parquet skip ``_work``.
"""
