"""`treadle launch`: what is shown and written, threads, exit codes, an end on Ctrl-C, and what cannot be started."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from treadle.distributed import launch as module
from treadle.distributed.comm import mpi_available
from treadle.distributed.errors import LaunchError
from treadle.distributed.launch import Request, command, launch, ranks_of

MISSING = mpi_available()
needs_mpi = pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")


RANK = "os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK']"


@pytest.fixture
def script(tmp_path):
    """Writes a script; gives its path. It knows its `rank` without Treadle, which would take a second to import."""

    def write(text):
        path = tmp_path / "script.py"
        path.write_text(f"import os, sys, time\nrank = int({RANK})\n{text}\n")
        return path

    return write


@dataclass
class Done:
    """A job that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run(path, *arguments, ranks=2, **options):
    """`treadle launch` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = launch(Request([str(path), *arguments], ranks, **options))
    return Done(code, out.getvalue(), err.getvalue())


@needs_mpi
def test_lines_begin_with_the_rank_and_do_not_mix(script):
    path = script("for i in range(50):\n    print('a' * 20, end=''); print('b' * 20, i)\nprint('at last', end='')")
    done = run(path, ranks=3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 153 and all(re.fullmatch(r"\[[012]\] (a{20}b{20} \d+|at last)", line) for line in lines)
    done = run(path, ranks=1)
    assert done.stdout.splitlines()[0] == "a" * 20 + "b" * 20 + " 0"


@needs_mpi
def test_every_rank_writes_its_log(script, tmp_path):
    path = script("print('out', rank, flush=True); print('err', rank, file=sys.stderr, flush=True); "
                  "os.write(1, b'native\\n')")
    done = run(path, logs=tmp_path / "logs")
    assert done.returncode == 0 and done.stdout.splitlines() == ["[0] out 0", "[0] native"]
    assert sorted(line for line in done.stderr.splitlines() if "err" in line) == ["[0] err 0", "[1] err 1"]
    for rank in (0, 1):
        assert sorted((tmp_path / "logs" / f"rank{rank}.log").read_text().splitlines()) == [
            f"err {rank}", "native", f"out {rank}"]


@needs_mpi
def test_a_log_that_cannot_be_written(script, tmp_path):
    (tmp_path / "file").touch()
    done = run(script("print('out')"), logs=tmp_path / "file" / "logs")
    assert done.returncode == 1 and "rank 0 cannot write its log in" in done.stderr
    assert "Traceback" not in done.stderr and "ended with exit code 1 first" in done.stderr


@needs_mpi
def test_a_module(script, monkeypatch):
    path = script("print('module', rank, sys.argv[1:])")
    monkeypatch.setenv("PYTHONPATH", str(path.parent))
    done = run("-m", path.stem, "--lr", ranks=1)
    assert done.returncode == 0 and done.stdout == "module 0 ['--lr']\n", done.stderr


@needs_mpi
def test_threads_are_the_cores_shared_out(script, monkeypatch):
    for name in ("TREADLE_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0))
    path = script("print(os.environ['TREADLE_NUM_THREADS'], os.environ['OMP_NUM_THREADS'], sys.argv[1:])")
    done = run(path, "--lr", "3", prefix=False)
    share = max(1, cores // 2)
    assert done.stdout.splitlines() == [f"{share} {share} ['--lr', '3']"] * 2
    done = run(path, threads=3)
    assert done.stdout.count("3 3 []") == 2 and f"2 ranks of 3 threads on {cores} cores" in done.stderr


@needs_mpi
def test_exit_codes_are_those_of_the_rank_that_failed_first(script):
    done = run(script("sys.exit(7 * rank)"))
    assert done.returncode == 7 and "rank 1 (on " in done.stderr and "ended with exit code 7 first" in done.stderr
    done = run(script("os.kill(os.getpid(), 11 * rank)"))
    assert done.returncode == 128 + 11 and "was killed by SIGSEGV first" in done.stderr


@needs_mpi
def test_ranks_that_go_on_after_another_failed_are_ended(script, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 1.0)
    started = time.monotonic()
    done = run(script("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                      "sys.exit(3) if rank else time.sleep(600)"))
    assert done.returncode == 3 and "rank 0 (on" in done.stderr and "was still running" in done.stderr
    assert time.monotonic() - started < 45


@needs_mpi
def test_restarts(script, tmp_path):
    path = script(f"open(r'{tmp_path}/times', 'a').write('x')\nprint('start', os.environ['TREADLE_RESTART'])\n"
                  "sys.exit(0 if os.environ['TREADLE_RESTART'] == '2' else 5)")
    done = run(path, ranks=1, restarts=3)
    assert done.returncode == 0 and (tmp_path / "times").read_text() == "xxx"
    assert done.stdout.splitlines() == ["start 0", "start 1", "start 2"]
    done = run(path, ranks=1, restarts=1)
    assert done.returncode == 5 and done.stderr.count("starting again") == 1


@needs_mpi
def test_interrupting_ends_every_rank(script, tmp_path):
    path = script("print('here', os.getpid(), flush=True); time.sleep(600)")
    job = subprocess.Popen([sys.executable, "-m", "treadle", "launch", "-n", "2", str(path)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    pids = [int(job.stdout.readline().split()[-1]) for _ in range(2)]
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)


@needs_mpi
def test_a_host_that_cannot_be_reached(script, monkeypatch):
    monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", "/bin/false")
    done = run(script("pass"), ranks=1, hosts="nowhere.invalid:1")
    assert done.returncode != 0 and "mpiexec started 0 of 1 ranks" in done.stderr


def test_no_mpiexec(monkeypatch):
    monkeypatch.setattr(module, "find_mpiexec", lambda: None)
    with pytest.raises(LaunchError, match="mpiexec was not found; install it with: pip install"):
        command(2, ["x.py"])


def test_what_cannot_be_started(tmp_path):
    with pytest.raises(LaunchError, match="there is no script 'nothing.py'"):
        launch(Request(["nothing.py"]))
    with pytest.raises(LaunchError, match="there is no script '-m'"):
        launch(Request(["-m"]))
    with pytest.raises(LaunchError, match="at least one rank, not 0"):
        command(0, ["x.py"])
    for hosts, message in (("a:2,:3", "NAME or NAME:RANKS, not ':3'"), ("a:x", "not 'a:x'"), ("a:0", "not 'a:0'")):
        with pytest.raises(LaunchError, match=message):
            ranks_of(Request(["x.py"], hosts=hosts))
    with pytest.raises(LaunchError, match="5 ranks do not fit the hosts, which take 4"):
        ranks_of(Request(["x.py"], ranks=5, hosts="a:2,b:2"))
    file = tmp_path / "hosts"
    with pytest.raises(LaunchError, match="cannot be read: No such file"):
        ranks_of(Request(["x.py"], hostfile=file))
    file.write_text("# nobody\n\n")
    with pytest.raises(LaunchError, match="names no host"):
        ranks_of(Request(["x.py"], hostfile=file))
    file.write_text("a:3  # the first\nb\n")
    assert ranks_of(Request(["x.py"], hostfile=file)) == 4
    assert ranks_of(Request(["x.py"], hosts="a:2,b:2", ranks=3)) == 3 and ranks_of(Request(["x.py"])) == 2
    with pytest.raises(LaunchError, match="--hosts or --hostfile, not both"):
        ranks_of(Request(["x.py"], hosts="a", hostfile=file))


def test_hosts_are_passed_to_either_mpi(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_mpiexec", lambda: "/usr/bin/mpiexec")
    for hydra, there in ((True, ["-hosts", "a:2,b:2"]), (False, ["--host", "a:2,b:2"])):
        monkeypatch.setattr(module, "_is_hydra", lambda _, hydra=hydra: hydra)
        line = command(4, ["x.py"], ["a:2", "b:2"], ["-iface", "eth1"])
        at = line.index(there[0])
        assert line[at:at + 2] == there and line[line.index("-n") + 1] == "4" and "-iface" in line
        assert hydra or "--oversubscribe" not in line and "--oversubscribe" in command(2, ["x.py"])


def test_help_has_examples():
    done = subprocess.run([sys.executable, "-m", "treadle", "launch", "--help"], capture_output=True, text=True,
                          timeout=60, env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"})
    assert done.returncode == 0 and "treadle launch -n 4 --max-restarts 3 train.py" in done.stdout
    assert "treadle launch --hosts a:4,b:4 train.py" in done.stdout
    assert "pip install 'treadle[mpi]'" in done.stdout
