"""Jobs take the GPUs that nobody uses: an endpoint on the same cluster may hold the others.

Ray counts GPUs that are not there if it is told to: nothing here runs on one.
"""

from scripts import output_of

SCRIPT = """
import json, time

import ray
from ray.cluster_utils import Cluster

from covtanet import cluster
from covtanet.errors import ConfigError
from covtanet.experiments import parallel
from covtanet.training.config import TrainingConfig

cluster.TIMEOUT_S = 2.0
cluster.SETTLED_AFTER_S = 0.5


@ray.remote(num_cpus=1, num_gpus=0.5, scheduling_strategy="SPREAD")
class Model:
    def ready(self):
        return True


def found():
    room = parallel._room(TrainingConfig(num_workers=1))
    return [cluster.wait_for_idle(lambda num_gpus: 3), cluster.wait_for_gpus(), room]


# Two nodes: a share of a GPU on each is no GPU.
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "num_gpus": 1})
nodes.add_node(num_cpus=3, num_gpus=1)
ray.init(address=nodes.address, logging_level="ERROR")
nodes.wait_for_nodes()
results = [found()]
with cluster.Turn() as first:
    took = []
    for _ in range(2):
        began = time.monotonic()
        with cluster.Turn():
            took.append(time.monotonic() - began)
        first.end()
    results.append([took[0] >= 2.0, took[1] >= 2.0])
models = [Model.remote()]
ray.get(models[0].ready.remote())
results.append(found())
try:
    parallel._room(TrainingConfig(num_workers=2))
except ConfigError as error:
    results.append(str(error))
models.append(Model.remote())
ray.get(models[1].ready.remote())
for refused in (lambda: cluster.wait_for_idle(lambda num_gpus: 3), found):
    try:
        refused()
    except ConfigError as error:
        results.append(str(error))
ray.shutdown()
nodes.shutdown()
print(json.dumps(results))
"""


def test_jobs_take_idle_gpus_only_and_refuse_to_run_beside_them_on_cpus() -> None:
    too_few = "1 GPUs of the cluster are idle, expected 2: one for each worker of a training"
    in_use = "all 2 GPUs of the cluster are in use, expected one to spare"
    # While another driver has its turn, and then.
    waited = [True, False]
    assert output_of(SCRIPT) == [[[6, 2], 2, 2], waited, [[5, 1], 1, 1], too_few, in_use, in_use]
