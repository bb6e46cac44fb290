"""The number of series that are left stays visible while none ends, as the alert needs it."""

import pytest
from scripts import output_of

SCRIPT = """
import json, socket, sys, time, urllib.request
from contextlib import closing

import ray

from covtanet.screening.metrics import Remaining

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(
    address="local", num_cpus=1, _metrics_export_port=port, include_dashboard=False,
    logging_level="ERROR", _node_ip_address="127.0.0.1",
)


def shown():
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if "covtanet_series_remaining{" in line]
    return [float(line.split()[-1]) for line in lines]


found = []
with closing(Remaining(7)) as remaining:
    remaining.set(5)
    time.sleep(45)
    found.append(shown())
time.sleep(45)
found.append(shown())
print(json.dumps(found))
ray.shutdown()
"""


@pytest.mark.slow
def test_remaining_series_stay_visible_while_none_ends_and_vanish_after_the_run() -> None:
    """Ray shows a gauge that is set once for some 20 s."""
    assert output_of(SCRIPT, timeout_s=180) == [[5.0], []]
