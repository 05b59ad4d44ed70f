"""Starts a script on several ranks, of one host or many: `treadle launch -n 4 script.py`.

mpiexec (of the running Python's environment, as the wheel `mpich` brings it, or the one on the path) places the ranks
and connects them. What it starts on each place is a keeper (`_rank.py`) that connects back to here: what ranks print
arrives over these sockets and is shown with the rank in front; how a rank ended is known exactly; and when one has
failed, the others have some seconds to say what they missed before all are ended, on every host, hung or not. Then the
whole job may be started again, to go on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import LaunchError
from .links import first_line, keep_alive, own_addresses

GRACE = 5.0   # seconds that the other ranks have after the first has failed
ENDING = 5.0   # seconds that mpiexec has to end when all ranks have
CHUNK = 1 << 16
RESTART = "TREADLE_RESTART"  # in the ranks' environment: how often the job was started again
KEEPER = str(Path(__file__).with_name("_rank.py"))


@dataclass(frozen=True)
class Request:
    """A job.

    Attributes:
        script: the script and its arguments; or `-m`, a module and its arguments.
        ranks: how many; None: one for each slot of the hosts, or 2.
        threads: of each rank; None: the cores of its host, shared out among the ranks there.
        logs: a folder for `rankN.log` on each host; then only rank 0, and errors, are shown.
        hosts: `a:2,b:2`; hostfile: the same, a host in a line. None of both: this host.
        restarts: how often the job is started again when it fails.
        prefix: shown lines begin with the rank.
        more: further arguments of mpiexec.
    """

    script: Sequence[str]
    ranks: int | None = None
    threads: int | None = None
    logs: Path | None = None
    hosts: str | None = None
    hostfile: Path | None = None
    restarts: int = 0
    prefix: bool = True
    more: str = ""


def find_mpiexec() -> str | None:
    """The launcher, or None."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def command(ranks: int, script: Sequence[str], hosts: Sequence[str] = (), more: Sequence[str] = ()) -> list[str]:
    """The command line of mpiexec, for MPICH's and its relatives' or for Open MPI's; `hosts`: as `places` gives them.

    Raises:
        LaunchError: there is no mpiexec, or fewer than one rank.
    """
    if ranks < 1:
        raise LaunchError(f"a job needs at least one rank, not {ranks}")
    mpiexec = find_mpiexec()
    if mpiexec is None:
        raise LaunchError("mpiexec was not found; install it with: pip install 'treadle[mpi]' (or your system's MPI)")
    hydra = _is_hydra(mpiexec)
    # Open MPI's would put more ranks on the first host than it was said to take.
    own = ["-disable-auto-cleanup"] if hydra else ["--oversubscribe"] if not hosts else []
    found = [mpiexec, *own, "-n", str(ranks), *more]
    if hosts:
        found += ["-hosts" if hydra else "--host", ",".join(hosts)]
    return [*found, sys.executable, "-u", *script]


def _is_hydra(mpiexec: str) -> bool:
    try:
        shown = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "HYDRA" in shown.upper()


def places(request: Request) -> list[str]:
    """The hosts, as `NAME:RANKS`; none: this one.

    Raises:
        LaunchError: a host is written in another way than NAME or NAME:RANKS, or the file cannot be read.
    """
    if request.hosts and request.hostfile:
        raise LaunchError("give --hosts or --hostfile, not both")
    lines = [h for h in (request.hosts or "").split(",") if h]
    if request.hostfile:
        try:
            lines = [line.split("#")[0].strip() for line in request.hostfile.read_text().splitlines()]
        except OSError as error:
            raise LaunchError(f"the hosts' file {request.hostfile} cannot be read: {error.strerror}") from error
        lines = [line for line in lines if line]
        if not lines:
            raise LaunchError(f"the hosts' file {request.hostfile} names no host")
    found = []
    for line in lines:
        name, _, count = line.partition(":")
        if not name or not (count or "1").isdigit() or int(count or 1) < 1:
            raise LaunchError(f"a host is written NAME or NAME:RANKS, not {line!r}")
        found.append(f"{name}:{int(count or 1)}")
    return found


def ranks_of(request: Request) -> int:
    """How many ranks to start.

    Raises:
        LaunchError: more than the hosts take.
    """
    room = sum(int(place.rpartition(":")[2]) for place in places(request))
    if request.ranks is None:
        return room or 2
    if room and request.ranks > room:
        raise LaunchError(f"{request.ranks} ranks do not fit the hosts, which take {room}: write the ranks of each, "
                          "--hosts a:4,b:4")
    return request.ranks


def launch(request: Request) -> int:
    """Runs the job, again if it fails and restarts are left.

    Returns:
        0, or the exit code of the rank that failed first (128 and the number of the signal that killed it), or 130
        after Ctrl-C.

    Raises:
        LaunchError: the script does not exist, mpiexec is missing, or the ranks do not fit the hosts.
    """
    module = len(request.script) > 1 and request.script[0] == "-m"
    if not module and not (request.script and Path(request.script[0]).is_file()):
        raise LaunchError(f"there is no script {request.script[0] if request.script else ''!r}")
    ranks = ranks_of(request)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if ranks * (request.threads or 1) > cores and not request.hosts and not request.hostfile:
        _say(f"{ranks} ranks of {request.threads or 1} threads on {cores} cores: they will wait for each other")
    code = 0
    for attempt in range(request.restarts + 1):
        code = _Attempt(request, ranks, attempt).run()
        if code in (0, 130):
            break
        if attempt < request.restarts:
            _say(f"starting again ({attempt + 1} of {request.restarts})")
    return code


def _say(text: str) -> None:
    print(f"treadle launch: {text}", file=sys.stderr, flush=True)


@dataclass
class _Rank:
    """What is known of a rank: its socket, what came in part, and how it ended (as `subprocess` says it)."""

    number: int
    link: socket.socket
    host: str
    data: bytes = b""
    lines: dict[str, bytes] = field(default_factory=lambda: {"o": b"", "e": b""})
    status: int | None = None
    lost: bool = False

    @property
    def failed(self) -> bool:
        return self.lost or bool(self.status)

    @property
    def end(self) -> str:
        """`rank 1 (on vm) was killed by SIGKILL`."""
        name = f"rank {self.number} (on {self.host})"
        if self.lost or self.status is None:
            return f"{name} is lost: its host does not answer" if self.lost else f"{name} was still running"
        if self.status < 0:
            with contextlib.suppress(ValueError):
                return f"{name} was killed by {signal.Signals(-self.status).name}"
        return f"{name} ended with exit code {self.status}"

    @property
    def code(self) -> int:
        return 1 if self.lost or self.status is None else self.status if self.status >= 0 else 128 - self.status


class _Attempt:
    """One start of the job."""

    def __init__(self, request: Request, ranks: int, attempt: int):
        self.request, self.count = request, ranks
        self.ranks: dict[int, _Rank] = {}
        self.failed: list[_Rank] = []  # in the order in which it became known
        self.selector = selectors.DefaultSelector()
        self.secret = secrets.token_hex(16)
        self.server = socket.create_server(("", 0), backlog=ranks)
        self.env = dict(os.environ)
        self.env["TREADLE_LAUNCH"] = " ".join([str(self.server.getsockname()[1]), self.secret, *own_addresses()])
        self.env[RESTART] = str(attempt)
        if request.threads:
            self.env["TREADLE_NUM_THREADS"] = str(request.threads)

    def run(self) -> int:
        """The exit code."""
        logs = "-" if self.request.logs is None else str(self.request.logs)
        # Isolated, as the modules beside it must not stand in for the library's.
        keeper = ["-I", KEEPER, logs, sys.executable, "-u", *self.request.script]
        line = command(self.count, keeper, places(self.request), shlex.split(self.request.more))
        before = signal.signal(signal.SIGTERM, _interrupt) if _main_thread() else None
        # A session of its own: Ctrl-C comes here, and what the ranks say about it is still shown.
        mpiexec = subprocess.Popen(line, env=self.env, stdin=subprocess.DEVNULL, start_new_session=True)
        code = 130
        try:
            self.selector.register(self.server, selectors.EVENT_READ)
            self._serve(mpiexec)
            code = self._code(mpiexec)
        except KeyboardInterrupt:
            _say("interrupted; ending the ranks")
        finally:
            self._end(mpiexec)
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        return code

    def _serve(self, mpiexec: Any) -> None:
        """Shows what comes until all ranks have ended, or the time is up after one has failed."""
        deadline = None
        while True:
            for key, _ in self.selector.select(0.1):
                if key.fileobj is self.server:
                    self._accept()
                else:
                    self._read(key.data)
            if self.failed and deadline is None:
                deadline = time.monotonic() + GRACE
            running = self.count - sum(r.status is not None or r.lost for r in self.ranks.values())
            if not running or deadline is not None and time.monotonic() > deadline:
                return
            if mpiexec.poll() is not None and len(self.ranks) < self.count and not self.selector.select(0.5):
                return  # it could not start them

    def _accept(self) -> None:
        link, _ = self.server.accept()
        link.settimeout(5)
        try:
            secret, number, host = first_line(link).split()
            if not secrets.compare_digest(secret, self.secret):
                raise ValueError("another job's")
            link.sendall(b"ok\n")
        except (OSError, ValueError):
            link.close()
            return
        keep_alive(link)
        link.setblocking(False)
        rank = self.ranks[int(number)] = _Rank(int(number), link, host)
        self.selector.register(link, selectors.EVENT_READ, rank)

    def _read(self, rank: _Rank) -> None:
        try:
            data = rank.link.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        rank.data += data
        while b"\n" in rank.data:
            head, _, rest = rank.data.partition(b"\n")
            kind, size = head.decode().split()
            if len(rest) < int(size):
                break
            rank.data = rest[int(size):]
            if kind == "x":
                self._ended(rank, int(rest[:int(size)]))
            else:
                self._show(rank, kind, rest[:int(size)])
        if not data:
            self.selector.unregister(rank.link)
            if rank.status is None:
                rank.lost = True
                self._ended(rank, None)

    def _ended(self, rank: _Rank, status: int | None) -> None:
        rank.status = status
        for kind in rank.lines:
            self._show(rank, kind, b"", last=True)
        if rank.failed:
            self.failed.append(rank)

    def _show(self, rank: _Rank, kind: str, data: bytes, last: bool = False) -> None:
        """Whole lines, so that those of different ranks do not mix."""
        *lines, rest = (rank.lines[kind] + data).split(b"\n")
        if last and rest:
            lines, rest = [*lines, rest], b""
        rank.lines[kind] = rest
        if self.request.logs is not None and kind == "o" and rank.number:
            return
        out = sys.stdout if kind == "o" else sys.stderr
        mark = f"[{rank.number}] " if self.request.prefix and self.count > 1 else ""
        for line in lines:
            out.write(f"{mark}{line.decode(errors='replace')}\n")
        out.flush()

    def _code(self, mpiexec: Any) -> int:
        if not self.failed:
            if len(self.ranks) < self.count:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    mpiexec.wait(ENDING)
                _say(f"mpiexec started {len(self.ranks)} of {self.count} ranks; what it says stands above")
                return mpiexec.returncode or 1
            return 0
        first, others = self.failed[0], [r for r in self.ranks.values() if r is not self.failed[0]]
        _say("; ".join([f"{first.end} first", *(r.end for r in sorted(others, key=lambda r: r.number))]))
        if self.request.logs is not None:
            _say(f"logs: {self.request.logs}/rank*.log on each host")
        return first.code

    def _end(self, mpiexec: Any) -> None:
        """Closing the sockets ends the keepers and what still runs under them; mpiexec follows."""
        for rank in self.ranks.values():
            rank.link.close()
        self.server.close()
        self.selector.close()
        for send in (None, mpiexec.terminate, mpiexec.kill):
            if send is not None:
                send()
            with contextlib.suppress(subprocess.TimeoutExpired):
                mpiexec.wait(ENDING)
                return


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
