"""Which network interface leads to the other nodes, where gloo or NCCL would take one that does not. Torch-free.

    python -m gloria.dist.interface PEER     # lines NAME=INTERFACE to export, and on stderr why

Both take GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for their choice, and what is set there stays.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import sys
from pathlib import Path

# Bridges and pairs of containers and virtual machines. NCCL itself leaves out only lo and docker*.
VIRTUAL = re.compile(r"(docker|virbr|veth|br-|podman|cni|flannel|cali|lxc)")
_SIOCGIFADDR = 0x8915


def addresses() -> dict[str, str]:
    """IPv4 address by interface, of those that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_to(peer: str) -> str:
    """The interface whose address a packet to `peer` would bear, or "" where none leads there. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return ""
        own = probe.getsockname()[0]
    return next((name for name, address in addresses().items() if address == own), "")


def own_name_leads_to() -> str:
    """Where this host's own name points, which is what gloo offers to the others: an interface, or "" if none."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    if address.startswith("127."):
        return "lo"
    return next((name for name, own in addresses().items() if own == address), "")


def report_choices(peer: str) -> None:
    """Print what to export so that gloo and NCCL reach `peer`; nothing where they would anyway, or none leads there."""
    way, found = interface_to(peer), {}
    if not way:
        return
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        own = own_name_leads_to()
        if own == "lo" or not own or VIRTUAL.match(own):
            found["GLOO_SOCKET_IFNAME"] = f"its own name leads to {own or 'no interface'}"
    others = [name for name in addresses() if name != "lo" and not name.startswith("docker")]
    # With InfiniBand NCCL takes that.
    if "NCCL_SOCKET_IFNAME" not in os.environ and not any(name.startswith("ib") for name in others):
        bridges = [name for name in others if VIRTUAL.match(name)]
        if bridges:
            found["NCCL_SOCKET_IFNAME"] = f"NCCL would also try {', '.join(bridges)}"
    for name, reason in found.items():
        print(f"{name}={way}")
        if os.environ.get("SLURM_LOCALID", "0") == "0":  # one rank a node says it
            why = f"{socket.gethostname()}: {reason}; {name}={way} leads to {peer} (GLORIA_INTERFACE names another)"
            print(why, file=sys.stderr, flush=True)


def in_use() -> str:
    """gloo's interface on this node, for people: its name, and its speed where the kernel knows it."""
    name = os.environ.get("GLOO_SOCKET_IFNAME") or own_name_leads_to()
    return f"{name or 'unknown'}{speed_text(name)}"


def faster_than_used() -> str:
    """An interface with an address that the kernel says is at least twice as fast as gloo's, or ""."""
    used = speed(os.environ.get("GLOO_SOCKET_IFNAME") or own_name_leads_to())
    best = max(addresses(), key=speed, default="")
    return f"{best}{speed_text(best)}" if used and speed(best) >= 2 * used else ""


def speed(name: str) -> int:
    """Mbit/s, or 0 where the kernel does not know (virtual ones)."""
    try:
        return max(0, int(Path(f"/sys/class/net/{name}/speed").read_text()))
    except (OSError, ValueError):
        return 0


def speed_text(name: str) -> str:
    found = speed(name)
    return f" ({found / 1000:g} Gbit/s)" if found else ""


if __name__ == "__main__":
    report_choices(sys.argv[1])
