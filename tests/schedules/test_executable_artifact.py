"""Saved programs: a fresh process without a compiler runs them; damaged or foreign files are refused."""

import json
import os
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from program_kernels import add, add_one, buffer, call, elementwise

import treadle as td
from treadle.ir.errors import ArtifactError, CompileError, TargetError
from treadle.schedules import artifact, link
from treadle.schedules import executable as executable_module
from treadle.schedules.artifact import load, save
from treadle.schedules.build import build
from treadle.schedules.executable import Signature
from treadle.schedules.program import Copy, Program
from treadle.schedules.target import Target

X = np.arange(8, dtype=np.float32)
C = np.linspace(0, 1, 8, dtype=np.float32)


def program() -> Program:
    x, t, y = buffer("x", "input"), buffer("t"), buffer("y", "output")
    c = buffer("c", "constant", data=C)
    steps = [call(add_one(parallel=True), x, t, label="add one"), call(add(), t, c, y)]
    return Program([x], [y], steps, name="saved", roles=["data"], meta={"tree": [1, {"a": None}]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "f.treadle"
    save(build(program()), path)
    return path


def test_round_trip(saved):
    original, loaded = build(program()), load(saved)
    assert loaded.signature == original.signature
    assert Signature.from_json(json.loads(json.dumps(original.signature.to_json()))) == original.signature
    assert loaded.signature.meta["tree"] == [1, {"a": None}]
    np.testing.assert_array_equal(loaded.run([X])[0], original.run([X])[0])
    np.testing.assert_array_equal(loaded.run([X])[0], X + 1 + C)
    with pytest.raises(CompileError, match="need the compiler"):
        loaded.kernel_times([X])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "bool", "float64", "uint16"])
def test_constants_of_every_dtype(tmp_path, dtype):
    values = np.array([0, 1, 0, 1, 1, 1, 0, 0]).astype(getattr(ml_dtypes, dtype, dtype))
    # The constant's bytes are read as what they are in memory.
    raw = {1: "uint8", 2: "uint16", 8: "uint64"}[values.dtype.itemsize]
    x, y = buffer("x", "input"), buffer("y", "output", dtype=raw)
    c = buffer("c", "constant", dtype=dtype, data=values)
    save(build(Program([x], [y], [call(elementwise("take", "<a>", (8,), dtype=raw), c, y)])), tmp_path / "f")
    np.testing.assert_array_equal(load(tmp_path / "f").run([X])[0], values.view(raw))


def test_constants_of_odd_shapes_and_layouts(tmp_path):
    x, y, s = buffer("x", "input"), buffer("y", "output"), buffer("s", "output", ())
    constants = [
        buffer("swapped", "constant", data=C.astype(">f4")),
        buffer("scalar", "constant", (), data=np.array(3, np.float32)),
        buffer("empty", "constant", (0, 2), data=np.zeros((0, 2), np.float32)),
    ]
    z = buffer("z", "output", (0, 2))
    steps = [call(add(), x, constants[0], y), Copy(constants[1], s), Copy(constants[2], z)]
    executable = build(Program([x], [y, s, z], steps))
    save(executable, tmp_path / "f")
    for found in (executable, load(tmp_path / "f")):
        total, scalar, empty = found.run([X])
        np.testing.assert_array_equal(total, X + C)
        assert scalar == 3 and scalar.shape == () and empty.shape == (0, 2)


def test_a_saved_program_can_be_saved_again(saved, tmp_path):
    save(load(saved), tmp_path / "again.treadle")
    np.testing.assert_array_equal(load(tmp_path / "again.treadle").run([X])[0], X + 1 + C)


def test_objects_are_saved_where_there_is_no_linker(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "linker", lambda: None)
    monkeypatch.setattr("treadle.schedules.build.linker", lambda: None)
    save(build(program()), tmp_path / "f")
    assert all(name.endswith(".o") for name in zipfile.ZipFile(tmp_path / "f").namelist() if name.startswith("code/"))
    np.testing.assert_array_equal(load(tmp_path / "f").run([X])[0], X + 1 + C)


FRESH = """
import sys, time
begun = time.perf_counter()
import numpy as np
from treadle.schedules.artifact import load
f = load(sys.argv[1])
result = f.run([np.arange(8, dtype=np.float32)])[0]
print(time.perf_counter() - begun)
assert not {"tvm", "torch"} & sys.modules.keys(), "what is not needed was imported"
mapped = open("/proc/self/maps").read()
assert "libtvm_runtime" in mapped and "libtvm_compiler" not in mapped
np.save(sys.argv[2], result)
"""


def test_a_fresh_process_needs_no_compiler(saved, tmp_path):
    """Neither TVM's compiler nor a linker nor a writable cache."""
    environment = {**os.environ, "PATH": "/nonexistent", "TREADLE_CACHE_DIR": "/proc/nonexistent"}
    command = [sys.executable, "-c", FRESH, str(saved), str(tmp_path / "y.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), X + 1 + C)


LEAN = """
import dataclasses, sys
import numpy as np
import treadle as td
before = set(sys.modules)
f = td.load(sys.argv[1])
f(np.arange(8, dtype=np.float32))
added = sorted(set(sys.modules) - before)
print(*(name for name in added if name.startswith("treadle.")))
heavy = ("tvm", "torch", "onnx", "safetensors", "platformdirs", "rich")
print(*(name for name in added if name.split(".")[0] in heavy))
print(*(f"{m}.{n}" for m in added for n, c in vars(sys.modules[m]).items()
        if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == m))
"""


def test_a_start_from_a_file_imports_little(tmp_path):
    """It is a matter of milliseconds, of which the definition of one frozen dataclass takes half of one."""
    f = td.compile(lambda x: td.sin(x) + 1)
    f(X)
    f.save(tmp_path / "f.treadle")
    done = subprocess.run([sys.executable, "-c", LEAN, str(tmp_path / "f.treadle")], capture_output=True, text=True,
                          check=True)
    ours, heavy, dataclasses = (line.split() for line in done.stdout.splitlines())
    needed = "abi arena artifact cache executable host link signature sized".split()
    assert set(ours) <= {f"treadle.schedules.{name}" for name in needed} and not heavy and not dataclasses


def test_a_program_is_compiled_and_saved_for_another_architecture(tmp_path):
    foreign = "cpu:sse4" if Target.parse("cpu").arch == "aarch64" else "cpu:neon"
    save(build(program(), foreign), tmp_path / "f")
    with zipfile.ZipFile(tmp_path / "f") as archive:
        objects = [archive.read(name) for name in archive.namelist() if name.endswith(".o")]
    machine = {0x3E: "cpu:sse4", 0xB7: "cpu:neon"}
    assert len(objects) == 3 and {machine[data[18]] for data in objects} == {foreign}  # e_machine of the ELF header
    with pytest.raises(TargetError, match="processor"):
        load(tmp_path / "f")


def test_saving_is_atomic(saved, tmp_path, monkeypatch):
    path = tmp_path / "f.treadle"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(artifact.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError, match="No space left"):
        save(load(saved), path)
    assert path.read_bytes() == b"what was there" and [p.name for p in tmp_path.iterdir()] == ["f.treadle"]


def test_metadata_that_is_no_json(tmp_path):
    broken = program()
    broken.meta = {"x": object()}
    with pytest.raises(ArtifactError, match="JSON"):
        save(build(broken), tmp_path / "f")


# -- refused --------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_foreign_one(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        load(tmp_path / "none.treadle")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ArtifactError, match="no saved program"):
        load(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("other", "file")
    with pytest.raises(ArtifactError, match="no proper manifest"):
        load(tmp_path / "zip")


def test_every_truncation_is_noticed(saved, tmp_path):
    data = saved.read_bytes()
    for length in [0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            load(tmp_path / "cut")


def test_flipped_bits_are_noticed_or_harmless(saved, tmp_path):
    """Some bytes of a zip archive mean nothing (times, attributes): there the program must still be the same."""
    data = saved.read_bytes()
    refused = 0
    positions = [*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 150, len(data))]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        (tmp_path / "flipped").write_bytes(damaged)
        try:
            found = load(tmp_path / "flipped")
        except ArtifactError:
            refused += 1
            continue
        np.testing.assert_array_equal(found.run([X])[0], X + 1 + C)
    assert refused > len(positions) // 2


def rewrite(saved, path, change):
    """The file with its manifest changed, checksums made right again."""
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    text = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"manifest.json": text, **members}.items():
            archive.writestr(name, data)
        archive.comment = b"treadle " + artifact.hashlib.sha256(text).hexdigest().encode()
    return path


def test_a_newer_format(saved, tmp_path):
    with pytest.raises(ArtifactError, match="install a newer treadle"):
        load(rewrite(saved, tmp_path / "f", lambda manifest, _: manifest.update(format=99)))


def test_code_for_another_processor(saved, tmp_path, monkeypatch):
    def other(manifest, _):
        manifest["signature"].update(arch="aarch64", features=["neon"], target="cpu:neon")

    with pytest.raises(TargetError, match="an aarch64 processor"):
        load(rewrite(saved, tmp_path / "f", other))
    monkeypatch.setattr(executable_module, "host_features", lambda: frozenset({"sse3"}))
    with pytest.raises(TargetError, match="this machine lacks"):
        load(saved)


@pytest.mark.parametrize("name", ["../../evil.so", "/etc/evil.so", "code/../evil.so", "code/x;y.so", "other.bin"])
def test_no_member_reaches_outside(saved, tmp_path, name):
    def add_member(manifest, members):
        members[name] = b"data"
        manifest["sha256"][name] = artifact.hashlib.sha256(b"data").hexdigest()

    before = set(tmp_path.parent.rglob("*evil*"))
    with pytest.raises(ArtifactError, match="names a member"):
        load(rewrite(saved, tmp_path / "f", add_member))
    assert set(tmp_path.parent.rglob("*evil*")) == before


def wrong_manifests():
    return {
        "no format": lambda m, _: m.pop("format"),
        "format of another type": lambda m, _: m.update(format="1"),
        "no signature": lambda m, _: m.pop("signature"),
        "unknown field": lambda m, _: m["signature"].update(extra=1),
        "member that is not there": lambda m, _: m["sha256"].update({"code/k_1.o": "00"}),
        "constants gone": lambda m, members: [d.pop("constants.bin") for d in (members, m["sha256"])],
        "constant of another shape": lambda m, _: m["signature"]["constants"][0].update(shape=[9]),
        "no list": lambda m, _: m.update(signature=[]),
    }


@pytest.mark.parametrize("case", wrong_manifests())
def test_a_manifest_that_lies(saved, tmp_path, case):
    with pytest.raises(ArtifactError):
        load(rewrite(saved, tmp_path / "f", wrong_manifests()[case]))
