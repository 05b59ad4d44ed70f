"""Two hosts on one machine: network namespaces joined by a pair of veth interfaces.

The second also has a host name, System V memory and a /dev/shm of its own, so that its ranks share nothing with those
of the first but files. MPICH's or Open MPI's mpiexec reaches them by a program that it takes for ssh.

What the environment variable TEST_QDISC holds is how `tc` is to slow the wire down both ways: "netem delay 5ms rate
1gbit", or, where the kernel has no netem, "tbf rate 200mbit burst 256kb latency 50ms".
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .launched import Place

SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec @b unshare -u -i -m sh -c 'hostname @b; mount -t tmpfs none /dev/shm; exec sh -c "$0"' "$*"
"""


def _ip(*arguments):
    """What it prints."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


class Hosts(Place):
    """`a` and `b`, names of namespaces; `addresses`, of both."""

    several = True

    def __init__(self, folder: Path):
        self.a, self.b = (f"treadle{os.getpid()}{x}" for x in "ab")
        self.wires = [f"tdl{os.getpid()}{x}" for x in "ab"]
        self.addresses = ["10.213.77.1", "10.213.77.2"]
        self.ssh = folder / "ssh"
        self.before = ("ip", "netns", "exec", self.a)
        self.environment = {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(self.ssh),
                            "PRTE_MCA_plm_ssh_agent": str(self.ssh), "OMPI_ALLOW_RUN_AS_ROOT": "1",
                            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def make(self):
        """Raises OSError or CalledProcessError where the machine does not allow it."""
        for name in (self.a, self.b):
            _ip("netns", "add", name)
        _ip("link", "add", self.wires[0], "netns", self.a, "type", "veth", "peer", "name", self.wires[1],
            "netns", self.b)
        for name, wire, address in zip((self.a, self.b), self.wires, self.addresses):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", wire)
        self.up()
        for name, wire in zip((self.a, self.b), self.wires) if "TEST_QDISC" in os.environ else ():
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", wire, "root", *os.environ["TEST_QDISC"].split())
        self.ssh.write_text(SSH.replace("@b", self.b))
        self.ssh.chmod(0o755)
        subprocess.run([str(self.ssh), "b", "true"], check=True, capture_output=True, timeout=20)

    def up(self):
        for name, wire in zip((self.a, self.b), self.wires):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", wire, "up")
        until = time.monotonic() + 20
        for name, wire in zip((self.a, self.b), self.wires):  # until its IPv6 address is known to be nobody else's
            shown = "-n", name, "addr", "show", "dev", wire
            while not _ip(*shown, "up") or _ip(*shown, "tentative"):
                if time.monotonic() > until:
                    raise OSError(f"the wire of {name} does not come up")
                time.sleep(0.05)

    def remove(self):
        for name in (self.a, self.b):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ip("netns", "del", name)

    def sent(self):
        """Bytes that went from the first host to the second."""
        found = subprocess.run(["ip", "netns", "exec", self.a, "cat", f"/sys/class/net/{self.wires[0]}/statistics/"
                                                                      "tx_bytes"],
                               check=True, capture_output=True, text=True, timeout=20)
        return int(found.stdout)

    def hosts_of(self, ranks):
        """Half of the ranks on either."""
        found = [f"{address}:{n}" for address, n in zip(self.addresses, (ranks - ranks // 2, ranks // 2))]
        return found[:ranks]


def unavailable():
    """Why there can be no namespaces here; None if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [p for p in ("ip", "unshare", "mount", "hostname") if shutil.which(p) is None]
    return f"{', '.join(missing)} is not installed" if missing else None
