"""Verifiers run where they were planned, so that what was planned for a trial is really left for it."""

import warnings
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster
from tiny_study import space

from cactus_ray.cluster import connect
from cactus_ray.cluster.broker import Broker, Limits
from cactus_ray.cluster.resources import plan
from cactus_ray.cluster.verifier import VerifierContext
from cactus_ray.cluster.verifier_pool import VerifierPool

pytestmark = [pytest.mark.ray, pytest.mark.cluster]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head of 4 CPUs, where Ray would put an actor first, and a node of 2."""
    for name, value in connect.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.usefixtures("two_nodes")
def test_a_trial_of_a_whole_node_has_it_beside_two_verifiers() -> None:
    asked = space(resources={"cpus_per_worker": 4, "verifiers": 2})
    nodes = connect.node_shapes()
    shares = plan(asked, ray.cluster_resources(), list(nodes.values()))
    places = [list(nodes)[place] for place in shares.verifier_nodes]
    assert {nodes[place]["CPU"] for place in places} == {2.0}
    assert shares.training == 1
    context = VerifierContext(asked.data, asked.threat, asked.verification, 1)
    broker = Broker(Limits(), ["verifier-0", "verifier-1"])
    pool = VerifierPool(context, broker, shares.verifier_resources, lambda trial: b"", places)
    assert len({ray.get(actor.pid.remote()) for actor in pool.actors.values()}) == 2
    whole = ray.remote(num_cpus=4)(lambda: "trained").remote()
    assert ray.get(whole, timeout=60) == "trained"
    pool.close()
