"""The network by which training workers exchange gradients."""

import os
import socket
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeNetworkConfig(TorchConfig):  # type: ignore[misc]
    """Settings of torch's process group: Gloo meets at the address by which Ray knows a node.

    Gloo would take the address of the host's name, which is loopback on many systems (127.0.1.1 in
    Debian's /etc/hosts): there no worker of another node answers.
    """

    @property
    def backend_cls(self) -> type:
        """The class that sets up the workers."""
        return _NodeNetworkBackend


class _NodeNetworkBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        # Before the process group is made.
        worker_group.execute(set_gloo_interface)
        super().on_start(worker_group, backend_config)


def set_gloo_interface() -> None:
    """Have Gloo use the interface with this node's address, unless the environment names one."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface:
        os.environ.setdefault(GLOO_INTERFACE, interface)


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface with an address; empty for none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            return str(name)
    return ""
