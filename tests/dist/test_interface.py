"""Prevents: nodes that offer each other their loopback or a bridge of containers, and wait there for half an hour."""

from __future__ import annotations

import pytest

from gloria.dist import interface

ETH, IB, BRIDGE, DOCKER = (
    {"eth0": "10.0.0.5"},
    {"ib0": "10.1.0.5"},
    {"virbr0": "192.168.122.1"},
    {"docker0": "172.17.0.1"},
)


@pytest.fixture
def node(monkeypatch):
    """A node called gpu01; gives `put(interfaces, where its name leads, interface to the peer)`."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)

    def put(addresses: dict[str, str], own: str, way: str) -> None:
        monkeypatch.setattr(interface, "addresses", lambda: {"lo": "127.0.0.1"} | addresses)
        monkeypatch.setattr(interface.socket, "gethostname", lambda: "gpu01")
        monkeypatch.setattr(interface.socket, "gethostbyname", lambda name: own)
        monkeypatch.setattr(interface, "interface_to", lambda peer: way)

    return put


@pytest.mark.parametrize(
    ("addresses", "own", "way", "lines", "reasons"),
    [
        (ETH, "10.0.0.5", "eth0", [], []),
        (ETH, "127.0.1.1", "eth0", ["GLOO_SOCKET_IFNAME=eth0"], ["its own name leads to lo"]),
        (ETH, "10.9.9.9", "eth0", ["GLOO_SOCKET_IFNAME=eth0"], ["its own name leads to no interface"]),
        (ETH | DOCKER, "172.17.0.1", "eth0", ["GLOO_SOCKET_IFNAME=eth0"], ["its own name leads to docker0"]),
        (ETH | DOCKER, "10.0.0.5", "eth0", [], []),  # NCCL leaves docker out by itself
        (ETH | BRIDGE, "10.0.0.5", "eth0", ["NCCL_SOCKET_IFNAME=eth0"], ["NCCL would also try virbr0"]),
        (ETH | BRIDGE | IB, "10.0.0.5", "ib0", [], []),
        (ETH, "127.0.1.1", "", [], []),  # nothing is known to be better
    ],
)
def test_what_leads_nowhere_is_replaced_and_reported(node, capsys, addresses, own, way, lines, reasons):
    node(addresses, own, way)
    interface.report_choices("gpu02")
    printed = capsys.readouterr()
    assert printed.out.splitlines() == lines
    ends = "leads to gpu02 (GLORIA_INTERFACE names another)"
    assert printed.err.splitlines() == [f"gpu01: {reason}; {line} {ends}" for reason, line in zip(reasons, lines)]


def test_what_the_user_has_set_stays(node, capsys, monkeypatch):
    node(ETH | BRIDGE, "127.0.1.1", "eth0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    interface.report_choices("gpu02")
    assert capsys.readouterr().out == ""


def test_one_rank_a_node_says_why(node, capsys, monkeypatch):
    node(ETH, "127.0.1.1", "eth0")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    interface.report_choices("gpu02")
    assert tuple(capsys.readouterr()) == ("GLOO_SOCKET_IFNAME=eth0\n", "")


def test_a_faster_interface_is_found(node, monkeypatch):
    node(ETH | IB, "10.0.0.5", "eth0")
    monkeypatch.setattr(interface, "speed", {"eth0": 1000, "ib0": 100_000, "lo": 0}.__getitem__)
    assert (interface.in_use(), interface.faster_than_used()) == ("eth0 (1 Gbit/s)", "ib0 (100 Gbit/s)")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert (interface.in_use(), interface.faster_than_used()) == ("ib0 (100 Gbit/s)", "")


def test_this_machine_knows_its_loopback():
    assert interface.addresses()["lo"] == "127.0.0.1"
    assert interface.interface_to("127.0.0.1") == "lo"
    assert interface.interface_to("nowhere.invalid") == ""
    assert interface.speed("lo") == 0
