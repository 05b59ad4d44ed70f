"""Programs kept on disk: a graph that was compiled before is neither rewritten, lowered nor built again."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

import treadle as td
from treadle.frontend import building
from treadle.schedules import program_cache
from treadle.schedules.cache import _cache_at, cache
from treadle.schedules.program_cache import program_key

X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def builds(tmp_path, monkeypatch) -> list[str]:
    """The graphs built from here on, in a cold cache. (The suite checks every pass, so it keeps none elsewhere.)"""
    monkeypatch.setenv("TREADLE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TREADLE_VERIFY", raising=False)
    made: list[str] = []
    build = building._build

    def counted(graph, *rest):
        made.append(graph.name)
        return build(graph, *rest)

    monkeypatch.setattr(building, "_build", counted)
    return made


def forget() -> None:
    """As a new process would: nothing in memory."""
    _cache_at.cache_clear()


def run(**options):
    weights = np.linspace(-1, 1, 4, dtype=np.float32)
    return td.compile(lambda x: td.tanh(x * weights) + 1, **options)(X).numpy()


def test_the_second_compilation_builds_nothing_and_gives_the_same(builds):
    first = run()
    forget()
    np.testing.assert_array_equal(run(), first)
    assert len(builds) == 1


def test_a_new_process_neither_builds_nor_imports_the_compiler(builds):
    script = (
        "import sys, numpy as np, treadle as td\n"
        "f = td.compile(lambda x: td.softmax(x @ np.ones((4, 5), np.float32), axis=-1))\n"
        "print(f(np.ones((3, 4), np.float32)).shape, 'tvm' in sys.modules, f.stats.compiled_kernels > 0)\n")
    answers = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
               for _ in range(2)]
    assert answers == ["(3, 5) True True\n", "(3, 5) False False\n"]


def test_what_decides_a_program_is_in_its_key(monkeypatch):
    monkeypatch.delenv("TREADLE_VERIFY", raising=False)
    spec = td.spec((3, 4), "float32")
    graph = td.trace(lambda x: td.exp(x) * 2.0, spec)
    same = td.trace(lambda x: td.exp(x) * 2.0, spec)
    same.name = graph.name
    key = program_key(graph, "cpu", None, None)
    assert key == program_key(same, "cpu", None, None)
    assert key not in (program_key(graph, "cpu:avx2", None, None), program_key(graph, "cpu", "bfloat16", None),
                       program_key(graph, "cpu", None, 1 << 20),
                       program_key(td.trace(lambda x: td.exp(x) * 3.0, spec), "cpu", None, None))
    monkeypatch.setattr(program_cache, "_sources", lambda: "changed")
    assert key != program_key(graph, "cpu", None, None)


@pytest.mark.parametrize("variable, value", [("TREADLE_VERIFY", "1"), ("TREADLE_DUMP", "folder"),
                                             ("TREADLE_LOG", "passes")])
def test_passes_that_are_watched_run(variable, value, monkeypatch):
    monkeypatch.delenv("TREADLE_VERIFY", raising=False)
    monkeypatch.setenv(variable, value)
    assert program_key(td.trace(td.exp, td.spec((3,), "float32")), "cpu") is None


def test_an_op_from_outside_is_built_each_time(builds):
    def halved():
        op = td.plugins.register_op("halved", "x", infer=lambda x: x, reference=lambda x: x / 2,
                                    decompose=lambda x: x * 0.5)
        try:
            return td.compile(lambda x: td.cond(td.sum(x) > 0, lambda v: op(v), lambda v: v, x))(X).numpy()
        finally:
            td.plugins.unregister_op("halved")

    np.testing.assert_array_equal(halved(), X / 2)
    np.testing.assert_array_equal(halved(), X / 2)
    assert len(builds) == 2


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".so"])
def test_what_is_missing_or_damaged_is_built_again(suffix, builds, tmp_path, caplog):
    first = run()
    paths = list((tmp_path / "cache").rglob(f"*{suffix}"))
    assert paths, f"no {suffix} was kept"
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    forget()
    with caplog.at_level(logging.WARNING, "treadle.cache"):
        np.testing.assert_array_equal(run(), first)
    assert len(builds) == 2 and "damaged" in caplog.text
    for path in paths:
        path.unlink(missing_ok=True)
    forget()
    np.testing.assert_array_equal(run(), first)
    assert len(builds) == 3


def test_a_library_that_does_not_load_is_built_again(builds, tmp_path, caplog):
    first = run()
    name = next((tmp_path / "cache").rglob("*.so")).name
    cache().put(name, b"no library")
    forget()
    with caplog.at_level(logging.WARNING, "treadle.cache"):
        np.testing.assert_array_equal(run(), first)
    assert len(builds) == 2 and "cannot be loaded" in caplog.text


def test_constants_return_bit_for_bit(builds):
    values = np.array([1.5, -0.0, np.inf, np.nan], np.float32)
    for dtype in ("bfloat16", "float16", "int8", "bool"):
        want = td.asarray(values[:3]).astype(dtype).numpy()
        for _ in range(2):
            got = td.compile(lambda w=want: td.concatenate([td.asarray(w), td.asarray(w)]))().numpy()
            assert got.tobytes() == want.tobytes() * 2
            forget()


class Wide(td.nn.Module):
    """Four megabytes of weights: large enough to be kept apart."""

    def __init__(self):
        super().__init__()
        td.random.seed(1)
        self.first, self.second = td.nn.Linear(1024, 512), td.nn.Linear(512, 1024)

    def forward(self, x):
        return self.second(td.tanh(self.first(x)))


def serve(rows: int) -> np.ndarray:
    model = Wide()
    x = np.linspace(-1, 1, rows * 1024, dtype=np.float32).reshape(rows, 1024)
    got = td.compile(model, freeze=True, specialize=True)(x).numpy()
    np.testing.assert_allclose(got, model(td.tensor(x)).numpy(), rtol=1e-4, atol=1e-5)
    return got


def test_large_constants_are_kept_once_by_their_elements(builds, tmp_path):
    first = serve(3)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert len(kept) == 2 and 4 << 20 <= sum(path.stat().st_size for path in kept) < 5 << 20
    forget()
    np.testing.assert_array_equal(serve(3), first)
    assert len(builds) == 1
    serve(5)  # another program of the same weights
    assert len(builds) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")} == kept


@pytest.mark.parametrize("how", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:],
                                 lambda data: b""])
def test_a_large_constant_that_is_damaged_is_built_again(how, builds, tmp_path, caplog):
    first = serve(3)
    path = next((tmp_path / "cache").rglob("*.bin"))
    path.write_bytes(how(path.read_bytes()))
    forget()
    with caplog.at_level(logging.WARNING, "treadle.cache"):
        np.testing.assert_array_equal(serve(3), first)
    assert len(builds) == 2 and "damaged" in caplog.text


def test_what_would_crowd_out_all_else_is_not_kept(builds, tmp_path, monkeypatch):
    monkeypatch.setenv("TREADLE_CACHE_BYTES", str(6 << 20))
    serve(3)
    serve(3)
    assert len(builds) == 2 and not list((tmp_path / "cache").rglob("*.bin"))


def test_weights_that_change_are_another_program(builds):
    model = Wide()
    x = np.ones((2, 1024), np.float32)
    first = td.compile(model, freeze=True)(x).numpy()
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    second = td.compile(model, freeze=True)(x).numpy()
    assert len(builds) == 2 and np.abs(second - first).max() > 0.1


def test_a_training_step_updates_what_it_is_given(builds):
    def losses():
        td.random.seed(3)
        model = td.nn.Sequential(td.nn.Linear(4, 8), td.nn.Dropout(0.5), td.nn.Linear(8, 2))
        step = td.train_step(model, lambda m, x: td.mean(td.square(m(x))), td.optim.AdamW(model.parameters(), lr=0.1))
        return [float(step(X)) for _ in range(4)], step

    first, _ = losses()
    forget()
    second, step = losses()
    assert first == second and first[-1] < first[0] and len(builds) == 1
    assert sum(t.calls for t in step.executable.kernel_times([*step_arrays(step)], repeat=1)) > 0


def step_arrays(step):
    """Arrays of the types that a step's program takes."""
    for info in step.executable.signature.inputs:
        yield np.ones(info.shape, info.dtype)
