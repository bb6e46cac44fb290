"""A large archive is scanned by tasks of Ray, a small one by the driver: both find the same."""

from pathlib import Path

from scripts import output_of

from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs

# Both ways over one archive, in one process; prints how many rows are equal.
BOTH = """
import sys, tempfile
from datetime import date
from pathlib import Path

import ray

from covtanet import ray_data
from covtanet.ledger.incremental import PreviousRuns
from covtanet.ledger.run import Run
from covtanet.screening import scan
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.listing import list_folders

archive, ledger = sys.argv[1:]
run = Run(
    archive=archive, ledger=ledger, run_date=date(2026, 11, 23), model_name="m", model_version="1",
    model_digest="d", config_digest="c", software_version="0",
)
limits = ScreeningConfig().decode_limits
ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR")
ray_data.configure(preserve_order=True)
with tempfile.TemporaryDirectory() as folder:
    listing = Path(folder) / "listing.parquet"
    _, num_objects = list_folders(run, listing, Path(folder) / "folders.parquet", PreviousRuns())
    assert num_objects < scan.MAX_OBJECTS_HERE
    here = list(scan.scan(run, limits, listing, num_objects))
    on_cluster = list(scan.scan(run, limits, listing, scan.MAX_OBJECTS_HERE + 1))
ray.shutdown()
assert here == on_cluster
print(len(here))
"""


def test_scan_by_the_driver_equals_that_by_tasks(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    rows = write_archive(str(archive), str(tmp_path / "truth"), list(configs(4, 5, 64, 14)), 2)
    # The note in the archive is one more row, of an object that belongs to no series.
    assert output_of(BOTH, archive, tmp_path / "ledger", timeout_s=180) >= len(rows)
