"""Keeps one rank of `treadle launch`: starts it, passes on what it prints and how it ends, and ends it when told.

MPI launchers end all ranks of a job, unasked and at once, when one dies; the others could not say what they miss. So
what the MPI launcher starts is this: it starts the rank, a process of its own, sends every line and at last the exit
status to `treadle launch` over a socket, and outlives the rank until that socket closes. If it closes early, the rank
is ended, wherever it hangs; if this process dies, the kernel ends the rank. Nothing of Treadle is imported.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys

RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
NEAR = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
LAUNCH = "TREADLE_LAUNCH"  # `PORT SECRET ADDRESS...` of `treadle launch`
CHUNK = 1 << 16
LINGER = 3600.0  # seconds that this process waits at most for the socket to close after its rank has failed


def given(names, default):
    """The first of some environment variables that is set."""
    return next((os.environ[name] for name in names if name in os.environ), default)


def connect(rank):
    """The socket to `treadle launch`; None without it. Ends the process if none of its addresses answers."""
    if LAUNCH not in os.environ:
        return None
    port, secret, *addresses = os.environ[LAUNCH].split()
    for address in addresses:
        with contextlib.suppress(OSError):
            link = socket.create_connection((address, int(port)), 5)
            link.sendall(f"{secret} {rank} {socket.gethostname()}\n".encode())
            if link.recv(3) == b"ok\n":
                link.settimeout(None)
                keep_alive(link)
                return link
            link.close()
    where = f"{', '.join(addresses)} port {port}"
    sys.exit(f"rank {rank} on {socket.gethostname()} cannot reach `treadle launch` at {where}")


def keep_alive(link):
    """Lets the kernel find out within five seconds that the host of `treadle launch` is gone (as in links.py)."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 5000)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def environment():
    """What the rank finds: threads are this host's cores, shared out among its ranks, unless they are given."""
    found = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.setdefault("TREADLE_NUM_THREADS", str(max(1, cores // max(1, int(given(NEAR, "1"))))))
    found.setdefault("OMP_NUM_THREADS", found["TREADLE_NUM_THREADS"])
    found.pop(LAUNCH, None)
    return found


def follow_parent():
    """In the rank: the kernel kills it when its keeper dies (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Keeper:
    """One rank, its pipes, the socket, and the log."""

    def __init__(self, rank, link, log, command):
        self.link, self.log = link, log
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      close_fds=False, env=environment(), preexec_fn=follow_parent)
        assert self.child.stdout is not None and self.child.stderr is not None
        self.pipes = {self.child.stdout.fileno(): "o", self.child.stderr.fileno(): "e"}
        self.selector = selectors.DefaultSelector()
        for number in self.pipes:
            self.selector.register(number, selectors.EVENT_READ)
        if link is not None:
            self.selector.register(link, selectors.EVENT_READ)

    def send(self, kind, data):
        """A frame to `treadle launch`, and output to the log; without either, to this process's own output."""
        if self.log is not None and kind in "oe":
            self.log.write(data)
            self.log.flush()
        if self.link is not None:
            with contextlib.suppress(OSError):
                self.link.sendall(f"{kind} {len(data)}\n".encode() + data)
        elif kind in "oe":
            with contextlib.suppress(OSError):
                os.write(1 if kind == "o" else 2, data)

    def run(self):
        """The exit status of the rank, as `subprocess` gives it, once all is said; None if `treadle launch` left."""
        while True:
            ended = self.child.poll() is not None
            ready = self.selector.select(0 if ended else 0.05)
            for key, _ in ready:
                if key.fd not in self.pipes:
                    if not self.heard():
                        return None
                    continue
                data = os.read(key.fd, CHUNK)
                if data:
                    self.send(self.pipes[key.fd], data)
                else:
                    self.selector.unregister(key.fd)
                    del self.pipes[key.fd]
            if ended and not ready:
                return self.child.returncode

    def heard(self):
        """Whether `treadle launch` is still there."""
        try:
            return bool(self.link.recv(CHUNK))
        except OSError:
            return False

    def end(self):
        """Ends the rank: politely, then not."""
        for send in (self.child.terminate, self.child.kill):
            send()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(2)
                return

    def linger(self):
        """Until `treadle launch` closes the socket: the MPI launcher would end the job if this process went first."""
        if self.link is not None:
            with contextlib.suppress(OSError):
                self.link.settimeout(LINGER)
                while self.link.recv(CHUNK):
                    pass


def main():
    folder, *command = sys.argv[1:]
    rank = given(RANK, "0")
    link, log = connect(rank), None
    if folder != "-":
        try:
            os.makedirs(folder, exist_ok=True)
            log = open(os.path.join(folder, f"rank{rank}.log"), "ab")
        except OSError as error:  # a rank that says so and ends
            said = f"rank {rank} cannot write its log in {folder}: {error.strerror}; give another folder to --logs"
            command = [sys.executable, "-I", "-c", f"import sys; sys.exit({said!r})"]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # MPICH's notice that another rank has died
    keeper = Keeper(rank, link, log, command)
    status = keeper.run()
    if status is None:
        keeper.end()
        return 0
    keeper.send("x", str(status).encode())
    if link is None:
        return status if status >= 0 else 128 - status
    if status:
        keeper.linger()
    return 0


if __name__ == "__main__":
    sys.exit(main())
