"""Sockets between the ranks of different hosts, by which the death of a process or of a host is noticed.

What shared memory and process numbers tell of the ranks of one host, the kernels tell of the others: a process that
dies, however it dies, has its sockets closed for it, and a host that does not answer the kernel's keep-alive probes is
given up after some seconds. Neither needs a heartbeat of ours, so a rank that compiles for minutes is not taken for
dead. The same sockets carry last words, since MPI's own connections may be what broke; and whoever waits for long asks
the others where they are. A thread of each rank answers, as the rank itself may compute, or hang.

Every rank listens, and connects to the lower ranks of other hosts: one socket for each pair of ranks on two hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .hung import GAP

ASK = 0.5  # seconds between two questions
IDLE, INTERVAL, PROBES = 2, 1, 3  # seconds of silence, seconds between probes, probes without answer: 5 s in all
CONNECT = 3.0  # seconds for each address of a rank
SIOCGIFADDR = 0x8915

log = logging.getLogger("treadle.distributed")


@dataclass(frozen=True)
class At:
    """Where a rank is: the last op it came to, of which step, and whether it waits there or computes.

    Attributes:
        looks: how often it has looked around while it waited.
        limit: seconds that it may stay there; 0: as long as it likes.
        stay: seconds that it has been there, as `hung.Stay` counts them.
    """

    step: int
    calls: int
    state: int
    looks: int
    limit: float
    stay: float
    label: str

    def __str__(self) -> str:
        return f"{self.label or 'no op'} of step {self.step} (call {self.calls})"

    def line(self) -> str:
        """For `read`."""
        return f"{self.step} {self.calls} {self.state} {self.looks} {self.limit} {self.stay} {self.label}"

    @staticmethod
    def read(line: str) -> At:
        """What `line` wrote."""
        step, calls, state, looks, limit, stay, label = line.split(" ", 6)
        return At(int(step), int(calls), int(state), int(looks), float(limit), float(stay), label)


class Links:
    """Sockets to the ranks of other hosts.

    Args:
        rank: of this process.
        host_of: for each rank the number of its host.
        exchange: every rank's text, everywhere, in the order of the ranks.
        here: where this rank is; called by the thread that answers.

    Attributes:
        lost: rank -> why it is known to be dead.
        left: rank -> the step in which it ended normally.
        words: rank -> its last words.
        at: rank -> where it was when it last answered.
        silent: rank -> seconds of the present wait since its last answer.
        deaf: ranks to which there is no socket; a warning said so.
    """

    def __init__(self, rank: int, host_of: Sequence[int], exchange: Callable[[str], list[str]],
                 here: Callable[[], At]):
        self.rank, self.here = rank, here
        self.lost: dict[int, str] = {}
        self.left: dict[int, int] = {}
        self.words: dict[int, str] = {}
        self.at: dict[int, At] = {}
        self.silent: dict[int, float] = {}
        self._asked = 0.0
        self._answers: set[int] = set()
        self.others = [r for r, host in enumerate(host_of) if host != host_of[rank]]
        self.sockets: dict[int, socket.socket] = {}
        self._buffers: dict[int, bytes] = {}
        self._poll = select.epoll()
        if not any(host != host_of[0] for host in host_of):
            return
        with socket.create_server(("", 0), backlog=len(host_of)) as server:
            told = exchange(" ".join([str(server.getsockname()[1]), secrets.token_hex(8), *own_addresses()])
                            if self.others else "")
            self._meet(server, [text.split() for text in told])
        self.deaf = [r for r in self.others if r not in self.sockets]
        if self.deaf:
            log.warning("rank %d cannot reach ranks %s by TCP: their death is noticed only when TREADLE_COMM_TIMEOUT "
                        "is over", rank, self.deaf)
        for link in self.sockets.values():
            keep_alive(link)
            link.setblocking(False)
            self._poll.register(link.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        self._by_number = {link.fileno(): other for other, link in self.sockets.items()}
        threading.Thread(target=self._listen, name="treadle-links", daemon=True).start()

    def _meet(self, server: socket.socket, told: Sequence[Sequence[str]]) -> None:
        """Accepts the higher ranks while connecting to the lower ones."""
        secret = told[self.rank][1]
        above = {r for r in self.others if r > self.rank}
        server.settimeout(CONNECT * 2)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while above - self.sockets.keys():
                    link, _ = server.accept()
                    link.settimeout(CONNECT)
                    with contextlib.suppress(OSError, ValueError):
                        number, given = first_line(link).split()
                        if given == secret and int(number) in above:
                            link.sendall(f"{self.rank}\n".encode())
                            self.sockets[int(number)] = link
                            continue
                    link.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        for other in (r for r in self.others if r < self.rank):
            port, given, *addresses = told[other]
            link = _connect(addresses, int(port), f"{self.rank} {given}\n", str(other))
            if link is not None:
                self.sockets[other] = link
        thread.join()

    def _listen(self) -> None:
        """Takes in what comes: fills `lost`, `left`, `words`, `at`; and answers."""
        while self.sockets:
            for number, _ in self._poll.poll():
                self._read(self._by_number[number])

    def ask(self, anew: bool = False) -> None:
        """Asks the others where they are, now and then; `anew`: this rank waits for something else than before."""
        now = time.monotonic()
        passed = now - self._asked
        if anew or passed < ASK:
            if anew:
                self.silent, self.at = dict.fromkeys(self.sockets, 0.0), {}
                self._answers = set(self.sockets)
            return
        for rank in self.silent:
            self.silent[rank] = 0.0 if rank in self._answers else self.silent[rank] + min(passed, GAP)
        self._asked, self._answers = now, set()
        self.tell("ask")

    def _read(self, other: int) -> None:
        link, why = self.sockets[other], ""
        try:
            data = link.recv(1 << 16)
            self._buffers[other] = self._buffers.get(other, b"") + data
            *lines, self._buffers[other] = self._buffers[other].split(b"\n")
            for line in lines:
                self._take(other, line.decode(errors="replace"))
            why = "" if data else "its process has ended"
        except BlockingIOError:
            return
        except OSError as error:
            reset = isinstance(error, ConnectionResetError)
            why = "its process has ended" if reset else f"its host does not answer ({error.strerror})"
        if why:
            self._poll.unregister(link.fileno())
            link.close()
            del self.sockets[other]
            if other not in self.left:
                self.lost[other] = why

    def _take(self, other: int, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "ask":
            with contextlib.suppress(OSError):
                self.sockets[other].send(f"at {self.here().line()}\n".encode())
        elif kind == "at":
            self.at[other] = At.read(rest)
            self._answers.add(other)
        elif kind == "left":
            self.left[other] = int(rest)
        elif kind == "failed":
            self.words[other] = rest

    def tell(self, line: str) -> None:
        """A line to all: `ask`, `left STEP`, `failed TEXT`. The answer to the first is `at` and `At.line`."""
        data = line.replace("\n", " ").encode() + b"\n"
        for link in list(self.sockets.values()):  # the thread takes out those that are lost
            with contextlib.suppress(OSError):
                link.send(data)


def keep_alive(link: socket.socket) -> None:
    """Lets the kernel find out, within seconds, that the other host is gone, whether something was sent or not."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES),
                        ("TCP_USER_TIMEOUT", 1000 * (IDLE + INTERVAL * PROBES))):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def own_addresses() -> list[str]:
    """IPv4 addresses of this host's interfaces, the loopback's last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                data: Any = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(data[20:24]))
    return sorted(set(found), key=lambda a: a.startswith("127."))


def _connect(addresses: Sequence[str], port: int, hello: str, answer: str) -> socket.socket | None:
    """A socket to the process that answers as expected: an address can mean one machine here and another there."""
    for address in addresses:
        with contextlib.suppress(OSError):
            link = socket.create_connection((address, port), CONNECT)
            link.sendall(hello.encode())
            if first_line(link) == answer:
                return link
            link.close()
    return None


def first_line(link: socket.socket) -> str:
    """The first line that comes, at most 300 bytes."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 300:
        byte = link.recv(1)
        if not byte:
            break
        data += byte
    return data.decode(errors="replace").strip()
