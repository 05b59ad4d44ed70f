"""Checkpoints: the same mesh goes on bit for bit, any other loads them, a crash while writing leaves the old one."""

import json
import os

import numpy as np
import pytest

import treadle as td
from treadle.distributed.comm import mpi_available
from treadle.frontend.stored import Stored, newest
from treadle.ir.errors import ArgumentsError, CheckpointError

from . import resuming

MISSING = mpi_available()
needs_mpi = pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")

ONE = {"name": "one", "mesh": {}, "accumulate": 4, "dropout": 0.25}
MESHES = {
    # name: a case of resuming.py; all compute what ONE does
    "zero1": {**ONE, "mesh": {"data": 2}, "zero": 1},
    "zero3": {**ONE, "mesh": {"data": 2}, "zero": 3},
    "tensor": {**ONE, "mesh": {"tensor": 2}},
    "pipe": {**ONE, "mesh": {"pipe": 2}},
}
LARGE = {
    "tensor x pipe": {**ONE, "mesh": {"tensor": 2, "pipe": 2}},
    "zero1 x tensor": {**ONE, "mesh": {"data": 2, "tensor": 2}, "zero": 1, "fused": True},
}


def ranks_of(case):
    return td.distributed.Mesh(case["mesh"]).size


def run_all(place, folder, cases):
    """Runs cases of one number of ranks as one job; gives their results by name."""
    done = place.start(ranks_of(cases[0]), "resuming.py", folder, *map(json.dumps, cases))
    assert done.returncode == 0, done.stderr[-4000:]
    return {case["name"]: dict(np.load(folder / f"{case['name']}.npz")) for case in cases}


def halves_of(place, folder, cases):
    """Trains four steps, and two that are saved; then two more in new processes: (results, cases that resume)."""
    first = [{**case, "name": name, "steps": 4} for name, case in cases.items()]
    first += [{**case, "name": f"half {name}", "steps": 2, "save": str(folder / name)} for name, case in cases.items()]
    # Another seed: what the checkpoint does not restore makes a difference.
    rest = [{**case, "name": f"rest {name}", "steps": 2, "load": str(folder / name), "seed": 99}
            for name, case in cases.items()]
    return run_all(place, folder, first), rest


def same_bits(found, resumed):
    assert found["losses"][2:].tobytes() == resumed["losses"].tobytes()
    assert set(found) == set(resumed)
    for name in set(found) - {"losses"}:
        assert found[name].tobytes() == resumed[name].tobytes(), name


def assert_close(found, expected, losses):
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-9)
    assert set(found) == set(expected)
    for name in set(found) - {"losses"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


def in_process(case, **more):
    losses, state, position = resuming.run({**case, **more})
    return {"losses": np.array(losses), "position": np.array(list(position.values())), **state}


@needs_mpi
@pytest.mark.slow
def test_any_mesh_goes_on_where_any_mesh_stopped(place, tmp_path):
    whole, rest = halves_of(place, tmp_path, MESHES)
    expected = in_process(ONE, steps=4)
    in_process(ONE, steps=2, save=str(tmp_path / "one"))
    others = [{**MESHES[there], "name": f"{here} to {there}", "steps": 2, "load": str(tmp_path / here), "seed": 99}
              for here, there in (("zero1", "tensor"), ("tensor", "pipe"), ("pipe", "zero3"), ("zero3", "zero1"),
                                  ("one", "tensor"), ("one", "pipe"), ("one", "zero3"))]
    found = run_all(place, tmp_path, rest + others)
    for name in MESHES:
        same_bits(whole[name], found[f"rest {name}"])
        assert_close(whole[name], expected, expected["losses"])
    for case in others:
        assert_close(found[case["name"]], expected, expected["losses"][2:])
    for name in MESHES:
        assert_close(in_process(ONE, steps=2, load=str(tmp_path / name), seed=99), expected, expected["losses"][2:])
        files = sorted(p.name for p in (tmp_path / name).iterdir())
        assert len(files) == 3 and files[0] == "index.json", "nothing else is left"


@needs_mpi
@pytest.mark.slow
def test_meshes_of_two_axes_go_on_with_the_same_bits(place, tmp_path):
    whole, rest = halves_of(place, tmp_path, LARGE)
    found = run_all(place, tmp_path, rest)
    for name in LARGE:
        same_bits(whole[name], found[f"rest {name}"])


def linear(inputs=2, mesh=None):
    """(model, optimizer, step) of one process."""
    td.random.seed(0)
    model = td.nn.Linear(inputs, 2)
    opt = td.optim.AdamW(model.parameters(), lr=0.1)
    step = td.train_step(model, lambda m, x: td.mean(m(x) ** 2), opt)
    return model, opt, td.distributed.parallelize(step, td.distributed.Mesh(mesh or {}))


X = np.ones((4, 2), np.float32)


def test_a_folder_and_a_file_load_each_other(tmp_path):
    model, opt, step = linear()
    step(X)
    step.save(tmp_path / "folder", {"epoch": "3"})
    td.save_checkpoint(tmp_path / "file.safetensors", model, opt, step=1, metadata={"epoch": "3"})
    rest = [float(step(X)) for _ in range(2)]
    for path in ("folder", "file.safetensors"):
        again, other, resumed = linear()
        assert resumed.load(tmp_path / path) == {"epoch": "3"} and other.steps == 1
        assert [float(resumed(X)) for _ in range(2)] == rest
        again, other, _ = linear()
        found = td.load_checkpoint(tmp_path / path, again, other)
        assert (found.step, found.metadata, other.steps) == (1, {"epoch": "3"}, 1)
        resumed = td.train_step(again, lambda m, x: td.mean(m(x) ** 2), other)
        assert [float(resumed(X)) for _ in range(2)] == rest


def test_tensors_with_two_names_are_written_once(tmp_path):
    def tied():
        model = td.nn.Sequential(td.nn.Linear(2, 2), td.nn.Linear(2, 2))
        model[1].weight = model[0].weight
        step = td.train_step(model, lambda m, x: td.mean(m(x)), td.optim.SGD(model.parameters(), lr=0.1))
        return model, td.distributed.parallelize(step, td.distributed.Mesh({}))

    (model, step), (other, resumed), (plain, _) = tied(), tied(), tied()
    step.save(tmp_path / "tied")
    stored = Stored(tmp_path / "tied")
    assert stored.aliases == {"1.weight": "0.weight"} and stored.shapes["1.weight"] == (2, 2)
    resumed.load(tmp_path / "tied")
    td.load_checkpoint(tmp_path / "tied", plain)
    for loaded in (other, plain):
        np.testing.assert_array_equal(loaded[1].weight.numpy(), model[0].weight.numpy())


def test_what_is_no_checkpoint(tmp_path):
    model, opt, step = linear()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        step.load(tmp_path)
    step.save(tmp_path / "a", {"epoch": "3"})
    with pytest.raises(CheckpointError, match=r"has \[2, 2\] for weight, the model \[2, 3\]"):
        linear(3)[2].load(tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds no position in the data"):
        step.load(tmp_path / "a", data=resuming.loader())
    td.save_checkpoint(tmp_path / "weights.safetensors", model)
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        step.load(tmp_path / "weights.safetensors")
    (part,) = (tmp_path / "a").glob("part-*")
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = model.weight.numpy()
    with pytest.raises(CheckpointError, match="checksum"):
        step.load(tmp_path / "a")
    part.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        step.load(tmp_path / "a")
    part.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        step.load(tmp_path / "a")
    assert before.tobytes() == model.weight.numpy().tobytes() and opt.steps == 0
    index = tmp_path / "a" / "index.json"
    for name in ("../weights.safetensors", str(tmp_path / "weights.safetensors")):
        index.write_text(json.dumps({**json.loads(index.read_text()), "files": [name]}))
        with pytest.raises(CheckpointError, match="lies elsewhere"):
            step.load(tmp_path / "a")
    index.write_text(json.dumps({**json.loads(index.read_text()), "version": 1}))
    with pytest.raises(CheckpointError, match="of another version than 2"):
        step.load(tmp_path / "a")
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        step.save(tmp_path / "taken")


def test_what_has_no_position(tmp_path):
    step, cursor = linear()[2], resuming.loader()
    for action in (step.save, step.load, step.resume):
        step.save(tmp_path, data=cursor)
        with pytest.raises(ArgumentsError, match=r"data is a list; expected something with state_dict\(\)"):
            action(tmp_path, data=[1])
    cursor.state_dict = lambda: {"rng": np.random.default_rng(0)}
    with pytest.raises(ArgumentsError, match="holds what JSON cannot: .*Generator"):
        step.save(tmp_path, data=cursor)


def test_the_newest_is_found_and_the_half_written_passed_over(tmp_path):
    _, opt, step = linear()
    assert newest(tmp_path / "nowhere") is None and step.resume(tmp_path) is None
    for i, name in enumerate(("step-9", "step-10")):
        step(X)
        step.save(tmp_path / name, {"number": name})
        os.utime(tmp_path / name / "index.json", (i + 1, i + 1))
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-11" / "part-aa-00000.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == tmp_path / "step-10"
    step(X)
    assert step.resume(tmp_path) == {"number": "step-10"} and opt.steps == 2
    assert step.resume(tmp_path / "step-9") == {"number": "step-9"} and opt.steps == 1


def test_saving_again_leaves_no_files_of_before(tmp_path):
    _, _, step = linear()
    for name in (".part-aa-00000.safetensors-bb", "part-aa-00001.safetensors", ".index.json-cc"):
        (tmp_path / name).write_bytes(b"of a killed job")
    (tmp_path / "notes.txt").write_text("the user's")
    for _ in range(2):
        step.save(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "notes.txt").exists()


def test_an_error_of_the_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model, _, step = linear()
    step.save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    step(X)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        step.save(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_of_a_parameter_that_nobody_looked_at_a_rank_reads_its_part(tmp_path):
    model, _, step = linear()
    step(X)
    step.save(tmp_path / "a")
    saved = model.weight.numpy()
    again, _, resumed = linear()
    resumed.load(tmp_path / "a")
    value = again.weight._value
    assert value.waiting
    np.testing.assert_array_equal(value.source.part((slice(1, 2), slice(0, 2))), saved[1:2])
    step(X)
    step.save(tmp_path / "a")  # what was loaded stays what it was
    assert value.waiting and again.weight.numpy().tobytes() == saved.tobytes() != model.weight.numpy().tobytes()


def test_a_cursor_goes_on_where_it_was():
    cursor, again = resuming.loader(), resuming.loader()
    taken = [batch for batch, _ in zip(cursor, range(4))]
    assert cursor.state_dict() == {"epoch": 1, "index": 2, "batches": 3}  # `zip` has taken one more
    again.load_state_dict({"epoch": 0, "index": 1, "batches": 3})
    for expected, batch in zip(taken[1:], again):
        np.testing.assert_array_equal(expected[0], batch[0])
    ended = td.finetune.Cursor(cursor.data, epochs=2)
    assert len(list(ended)) == 6 and not list(ended)
    with pytest.raises(CheckpointError, match="in data of 4 batches an epoch; this data has 3"):
        again.load_state_dict({"epoch": 0, "index": 1, "batches": 4})
