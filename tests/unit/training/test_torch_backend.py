"""The network interface of training workers."""

import os

import pytest

from covtanet.training.torch_backend import GLOO_INTERFACE, interface_of, set_gloo_interface


def test_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1").startswith("lo")
    # Of TEST-NET-3, which no machine has.
    assert interface_of("203.0.113.1") == ""


def test_interface_that_the_environment_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "eth7")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    set_gloo_interface()
    assert os.environ[GLOO_INTERFACE] == "eth7"
    monkeypatch.delenv(GLOO_INTERFACE)
    set_gloo_interface()
    assert os.environ[GLOO_INTERFACE].startswith("lo")
