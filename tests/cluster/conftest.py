"""A Ray cluster of two nodes with a core each, in processes of this machine, for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

STORE_BYTES = 150 << 20
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # on a machine that is busy with other tests, workers would hardly run
}


class Nodes:
    """The cluster; nodes can be added and killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.others: list[Any] = []

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        address: str = self._cluster.address
        return address

    def ensure(self, others: int) -> None:
        """Have so many nodes beside the head."""
        while len(self.others) < others:
            self.others.append(self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))

    def kill(self) -> str:
        """SIGKILL a node that is not the head: all its processes; its id."""
        node = self.others.pop()
        self._cluster.remove_node(node, allow_graceful=False)
        name: str = node.node_id
        return name

    def stop(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """The cluster. Tests that kill a node leave it to the next one to `ensure` what it needs."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    made = Nodes()
    made.ensure(1)
    yield made
    made.stop()
