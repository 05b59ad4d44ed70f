"""The kernel cache: damage, crashes, concurrency, disks that cannot be written, size."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from program_kernels import add_one, buffer, call, chain, double, many_kernels, prim_func

from treadle.ir.errors import CompileError
from treadle.schedules import build as build_module
from treadle.schedules import codegen, link
from treadle.schedules.build import build, kernel_key
from treadle.schedules.cache import Cache, _cache_at, cache, digest
from treadle.schedules.program import KernelCall, Program
from treadle.schedules.target import Target

X = np.arange(8, dtype=np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A cold cache of its own."""
    monkeypatch.setenv("TREADLE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forget() -> None:
    """As a new process would: nothing in memory."""
    _cache_at.cache_clear()


def entries(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(suffix))


def test_round_trip_and_miss(tmp_path):
    store = Cache(tmp_path, 1 << 20)
    assert store.get("ab.o") is None
    store.put("ab.o", b"code")
    assert store.get("ab.o") == b"code" == Cache(tmp_path, 1 << 20).get("ab.o")
    assert store.path("ab.o").read_bytes().startswith(b"code")
    store.discard("ab.o")
    assert Cache(tmp_path, 1 << 20).get("ab.o") is None


def test_digest_depends_on_every_part_and_its_border():
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("ab", "c", "")}) == 4


def test_a_warm_start_compiles_and_links_nothing(folder, monkeypatch):
    first = build(chain())
    assert (first.stats.kernels, first.stats.compiled, first.stats.library_cached) == (1, 1, False)
    forget()
    for name in ("compile_kernel", "compile_host"):
        monkeypatch.setattr(codegen, name, lambda *a: pytest.fail("compiled"))
    monkeypatch.setattr(build_module, "link", lambda *a: pytest.fail("linked"))
    second = build(chain(), progress=lambda *a: pytest.fail("no work to report"))
    assert (second.stats.compiled, second.stats.library_cached) == (0, True)
    np.testing.assert_array_equal(second.run([X])[0], first.run([X])[0])


def test_another_program_shares_kernels(folder):
    build(chain(3))
    forget()
    stats = build(chain(5)).stats
    assert (stats.kernels, stats.compiled, stats.library_cached) == (1, 0, False)


def test_the_key_is_structure_and_target_not_name():
    target = Target.parse("cpu")
    renamed = add_one().with_attr("global_symbol", "another")
    assert kernel_key(renamed, target) == kernel_key(add_one(), target)
    keys = {kernel_key(add_one(), target), kernel_key(double(), target), kernel_key(add_one((9,)), target),
            kernel_key(add_one(), Target.parse("cpu:sse4"))}  # fmt: skip
    assert len(keys) == 4


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "trailer": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "garbage": lambda data: os.urandom(50),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_entries_are_noticed_and_made_again(folder, kind, caplog):
    build(chain())
    for path in entries(folder):
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    forget()
    with caplog.at_level(logging.WARNING, "treadle.cache"):
        executable = build(chain())
    assert executable.stats.compiled == 1 and "damaged" in caplog.text
    np.testing.assert_array_equal(executable.run([X])[0], X + 3)
    forget()
    assert build(chain()).stats.library_cached


def test_an_unwritable_folder_is_one_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")  # (permissions would not stop root)
    monkeypatch.setenv("TREADLE_CACHE_DIR", str(blocked / "cache"))
    with caplog.at_level(logging.WARNING, "treadle.cache"):
        assert build(chain(3)).run([X])[0][0] == 3
        assert build(chain(4)).run([X])[0][0] == 4
    assert caplog.text.count("cannot be written") == 1
    assert build(chain(3)).stats.library_cached  # in memory


@pytest.mark.parametrize("failing", ["open", "fsync", "replace"])
def test_a_full_or_read_only_disk_leaves_nothing_behind(folder, monkeypatch, caplog, failing):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC if failing != "open" else errno.EROFS, "no")

    if failing == "open":
        monkeypatch.setattr("treadle.schedules.cache.open", fail, raising=False)
    else:
        monkeypatch.setattr(f"treadle.schedules.cache.os.{failing}", fail)
    with caplog.at_level(logging.WARNING, "treadle.cache"):
        assert build(chain()).run([X])[0][0] == 3
    assert caplog.text.count("cannot be written") == 1 and entries(folder) == []


def test_the_least_recently_used_go_first(tmp_path):
    store = Cache(tmp_path, 1 << 20)
    now = time.time()
    for i in range(10):
        store.put(f"{i:02d}.o", bytes(100_000))
        os.utime(store.path(f"{i:02d}.o"), (now - 10_000 + i, now - 10_000 + i))
    fresh = Cache(tmp_path, 600_000)
    assert fresh.get("00.o") is not None  # its time is renewed by the use
    fresh.prune()
    assert fresh.nbytes() <= 600_000
    kept = {p.name for p in entries(tmp_path)}
    assert {"00.o", "09.o"} <= kept and "01.o" not in kept


def test_writing_keeps_the_size_bound(tmp_path):
    store = Cache(tmp_path, 100_000)
    for i in range(40):
        store.put(f"{i:02d}.o", bytes(10_000))
    assert store.nbytes() <= 110_000


def test_dead_writers_files_are_removed_and_live_ones_are_not(tmp_path):
    store = Cache(tmp_path, 1 << 20)
    store.put("ab.o", b"x")
    dead, live = store.path("ab.o").with_name(".tmp-1-dead"), store.path("ab.o").with_name(".tmp-2-live")
    for path in (dead, live):
        path.write_bytes(b"half")
    os.utime(dead, (0, 0))
    store.prune()
    assert not dead.exists() and live.exists() and store.get("ab.o") == b"x"


def test_an_entry_pruned_by_another_process_is_a_miss(folder):
    build(chain())
    store = cache()
    forget()
    for path in entries(folder):
        path.unlink()
    assert build(chain()).stats.compiled == 1
    store.clear()
    assert entries(folder) == []


def test_a_kernel_that_tvm_rejects_is_a_compile_error(folder):
    """Nested parallel loops: TVM refuses them in code generation."""
    nested = prim_func('''
@T.prim_func(s_tir=True)
def nested(A: T.Buffer((2, 2), "float32"), B: T.Buffer((2, 2), "float32")):
    for i in T.parallel(2):
        for j in T.parallel(2):
            B[i, j] = A[i, j]
''')
    x, y = buffer("x", "input", (2, 2)), buffer("y", "output", (2, 2))
    with pytest.raises(CompileError, match="could not be compiled for cpu"):
        build(Program([x], [y], [KernelCall(nested, [x, y], [1])]))
    assert entries(folder) == []


def test_a_failing_kernel_is_named_and_the_rest_cancelled(folder, monkeypatch):
    real = codegen.compile_kernel

    def compile_kernel(function, symbol, target):
        if "double" in str(function.attrs["global_symbol"]):
            raise CompileError(f"kernel {symbol} could not be compiled")
        return real(function, symbol, target)

    monkeypatch.setattr(codegen, "compile_kernel", compile_kernel)
    x, t, y = buffer("x", "input"), buffer("t"), buffer("y", "output")
    program = Program([x], [y], [call(add_one(), x, t), call(double(), t, y)])
    with pytest.raises(CompileError, match="could not be compiled"):
        build(program)
    monkeypatch.undo()


def test_progress_counts_to_the_end(folder):
    seen = []
    build(chain(), progress=lambda *report: seen.append(report))
    assert seen[0][:2] == (0, 2) and seen[-1][:2] == (2, 2)
    assert {label for _, _, label in seen} == {"", "add_one", "driver"}


def test_interrupt_leaves_no_debris(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(link.tempfile, "tempdir", str(tmp_path))

    def interrupt(done, total, label):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(chain(), progress=interrupt)
    assert [p.name for p in tmp_path.rglob("*") if "tmp-" in p.name or p.name.startswith("treadle-")] == []
    assert build(chain()).run([X])[0][0] == 3


# -- several processes ----------------------------------------------------------------------------------------

SCRIPT = """
import sys; sys.path.insert(0, {here!r})
import numpy as np
from program_kernels import many_kernels
from treadle.schedules.build import build
e = build(many_kernels(6))
assert (e.run([np.zeros(64, np.float32)])[0] == 6).all()
"""


def start(folder: Path, script: str = SCRIPT) -> subprocess.Popen:
    code = script.format(here=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TREADLE_CACHE_DIR": str(folder)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_who_is_first_makes_an_entry_and_the_others_wait(tmp_path):
    """Another process comes while the entry is made: it finds it made, and leaves no file behind."""
    ours, script = Cache(tmp_path, 1 << 20), """
import sys
from treadle.schedules.cache import Cache
theirs = Cache(sys.argv[1], 1 << 20)
print("asking", flush=True)
with theirs.alone("ab1.o"):
    print(theirs.get("ab1.o"), flush=True)
"""
    with ours.alone("ab1.o"):
        other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "asking\n"
        time.sleep(0.2)
        ours.put("ab1.o", b"made")
    assert other.communicate(timeout=60)[0] == "b'made'\n"
    assert [p.name for p in (ours.directory / "ab").iterdir()] == ["ab1.o"]


def test_two_processes_compile_at_once(folder):
    for process in [start(folder), start(folder)]:
        finish(process)
    assert len(entries(folder, ".o")) == 6 and len(entries(folder, ".so")) == (link.linker() is not None)
    stats = build(many_kernels(6)).stats
    assert (stats.kernels, stats.compiled) == (6, 0)


WRITER = """
import os
from pathlib import Path
from treadle.schedules.cache import Cache
store = Cache(Path(os.environ["TREADLE_CACHE_DIR"]), 1 << 30)
print("ready", flush=True)
while True:
    store.put("ab12.o", b"{letter}" * 5_000_000)
"""


def test_a_killed_writer_never_shows_half_an_entry(folder):
    writers = [start(folder, WRITER.replace("{letter}", letter)) for letter in "ab"]
    for writer in writers:
        assert writer.stdout.readline().strip() == "ready"
    deadline, reads = time.time() + 20, 0
    while reads < 20 and time.time() < deadline:
        data = Cache(folder, 1 << 30).get("ab12.o")
        if data is not None:
            assert len(data) == 5_000_000 and len(set(data)) == 1
            reads += 1
    assert reads
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    data = Cache(folder, 1 << 30).get("ab12.o")
    assert data is not None and len(data) == 5_000_000
