"""Screen night after night on a changing archive, under random faults, and check every ledger.

python -m benchmarks.soak [--hours 1] [--seed 0]

The services are real: S3 (rclone) behind a proxy that can be slow, shut or lie, and one Ray for all
nights, made anew if its node is killed. The first night is undisturbed and screens one copy of
every phantom; the numbers of all later copies are compared with its own. Each later night brings
new, changed and removed series and one or two disturbances; one night in six has none. The nightly
command is started again until the night is committed. Ends with 1 if a ledger does not hold what it
should. Kept: a table under benchmarks/, and the logs of the jobs in .bench/soak.
"""

import argparse
import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.measure import WORK
from benchmarks.screening_runs import model_folder
from benchmarks.soak.archive import LivingArchive, make_masters
from benchmarks.soak.cluster import Cluster
from benchmarks.soak.disturbances import DISK_FULL, KINDS, Disturbance, Machinery, deck, small_disk
from benchmarks.soak.faulty_store import FaultyStore
from benchmarks.soak.night import Night, Soak
from benchmarks.soak.table import HEAD, keep_nights, line
from covtanet.storage import s3
from infra.local.services import start_s3

# A night may not lie in the future: that of an hour is one of some 150, each a day.
FIRST_NIGHT = timedelta(days=3000)
NUM_SOUND = 9
CONFIG = '[screening]\nengine = "eager"\ndecode_timeout_s = 20\n'
DISK_BYTES = 512 << 20
SHARE_OF_QUIET_NIGHTS, SHARE_OF_SINGLE_FAULTS = 1 / 6, 2 / 3


def main() -> int:
    """Run nights until the time is over."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--hours", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0, help="of archive and disturbances")
    arguments = options.parse_args()
    nights: list[Night] = []
    with soak(WORK / "soak", arguments.seed) as running:
        print(line(HEAD), flush=True)
        for night in run_nights(running, arguments.seed, arguments.hours * 3600):
            nights.append(night)
            print(line(night.cells()), *night.faults[:20], sep="\n  ", flush=True)
    keep_nights(nights, arguments.hours, arguments.seed)
    return 1 if any(night.faults for night in nights) else 0


def run_nights(running: Soak, seed: int, seconds: float) -> Iterator[Night]:
    """Run whole nights until the time is over: the first without a disturbance."""
    rng = random.Random(seed)
    has_disk = running.machinery.disk.is_mount()
    kinds = tuple(kind for kind in KINDS if has_disk or kind != DISK_FULL)
    if not has_disk:
        print(f"  without {DISK_FULL!r}, for which this must run as root")
    disturbances = deck(rng, kinds)
    first = datetime.now(UTC).date() - FIRST_NIGHT
    deadline = time.monotonic() + seconds
    running.archive.fill()
    yield running.run(first, [])
    for number in itertools.count(1):
        if time.monotonic() > deadline:
            return
        running.archive.pass_a_day()
        yield running.run(first + timedelta(days=number), _some(rng, disturbances))


def _some(rng: random.Random, disturbances: Iterator[Disturbance]) -> list[Disturbance]:
    """Take no, one or two disturbances."""
    if rng.random() < SHARE_OF_QUIET_NIGHTS:
        return []
    count = 1 if rng.random() < SHARE_OF_SINGLE_FAULTS else 2
    return list(itertools.islice(disturbances, count))


@contextmanager
def soak(folder: Path, seed: int, num_sound: int = NUM_SOUND) -> Iterator[Soak]:
    """Start S3, the proxy before it and a Ray; the process' own S3 client passes by the proxy."""
    shutil.rmtree(folder, ignore_errors=True)
    before = dict(os.environ)
    with ExitStack() as stack:
        stack.callback(_restore, before)
        logs = folder / "logs"
        logs.mkdir(parents=True)
        masters = make_masters(folder, num_sound)
        stack.enter_context(small_disk(folder / "s3" / "ledger", DISK_BYTES))
        (folder / "s3" / "archive").mkdir()
        server = start_s3(folder / "s3", folder / "s3.log")
        stack.callback(server.stop)
        store = FaultyStore(server.environment["AWS_ENDPOINT_URL"])
        stack.callback(store.close)
        os.environ.update(server.environment)
        s3.client.cache_clear()
        variables = {**server.environment, "AWS_ENDPOINT_URL": store.url}
        cluster = stack.enter_context(Cluster(folder, variables))
        config = folder / "screening.toml"
        config.write_text(CONFIG)
        yield Soak(
            archive=LivingArchive("s3://archive/ct", masters, random.Random(seed)),
            ledger="s3://ledger/nights",
            model=model_folder(),
            config=config,
            machinery=Machinery(cluster=cluster, store=store, disk=folder / "s3" / "ledger"),
            logs=logs,
        )


def _restore(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    s3.client.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
