"""A plan takes the GPUs that nobody uses: an endpoint on the same cluster may hold the others.

Ray counts GPUs that are not there if it is told to: nothing here runs on one.
"""

from scripts import output_of

SCRIPT = """
import json, sys

import ray

from covtanet.errors import ConfigError
from covtanet.screening import free_room

free_room.FREE_ROOM_TIMEOUT_S = 2.0
free_room.SETTLED_AFTER_S = 0.5


@ray.remote(num_cpus=1)
class Model:
    def ready(self):
        return True


ray.init(address="local", num_cpus=6, num_gpus=2, include_dashboard=False, logging_level="ERROR")
found = [free_room.wait_for_room([6])]
models = [Model.options(num_gpus=0.5).remote()]
ray.get(models[0].ready.remote())
found.append(free_room.wait_for_room([6]))
models.append(Model.options(num_gpus=1).remote())
ray.get(models[1].ready.remote())
try:
    free_room.wait_for_room([6])
except ConfigError as error:
    found.append(str(error))
ray.shutdown()
print(json.dumps(found))
"""


def test_plan_takes_idle_gpus_only_and_refuses_to_run_beside_them_on_cpus() -> None:
    assert output_of(SCRIPT) == [
        [6, 2],
        [5, 1],
        "all 2 GPUs of the cluster are in use, expected one to spare",
    ]
