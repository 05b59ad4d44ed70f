"""Low-rank adapters on layers and on imported graphs."""

import numpy as np
import onnx
import pytest

import treadle as td

from . import models

ft = td.finetune
rng = np.random.default_rng(0)


def layered():
    td.random.seed(0)
    return td.nn.Sequential(td.nn.Linear(6, 8), td.nn.ReLU(), td.nn.Linear(8, 3))


def imported():
    return ft.add_head(models.load(models.encoder()), 3, pool="mean", mask="mask")


X = rng.standard_normal((16, 6)).astype(np.float32)
CASES = {
    "layers": (layered, "*", (X,), ["0.weight", "2.weight"]),
    "graph": (imported, "*query*, *value*", (np.tile(models.IDS, (4, 1)), np.tile(models.MASK, (4, 1))),
              ["body.onnx::MatMul_0", "body.onnx::MatMul_2", "body.onnx::MatMul_100", "body.onnx::MatMul_102"]),
}
Y = rng.integers(0, 3, 16)


@pytest.fixture(params=CASES)
def case(request):
    make, patterns, inputs, expected = CASES[request.param]
    net = make()
    net.eval()
    return make, net, patterns, inputs, expected


def trained(net, inputs, **options):
    run = ft.Tuner(net, (*inputs, Y), batch_size=8, epochs=3, lr=0.05, show=False, keep_best=False, **options)
    run.fit()
    return run


def test_a_fresh_adapter_changes_nothing_and_only_it_trains(case):
    make, net, patterns, inputs, expected = case
    plain = net(*inputs).numpy()
    assert ft.add_lora(net, patterns, rank=2) == expected
    np.testing.assert_array_equal(net(*inputs).numpy(), plain)
    trains = ft.train_only(net, "*.lora.*")
    assert trains == [f"{n}.lora.{k}" for n in expected for k in "ab"]
    before = {n: t.numpy() for n, t in net.state_dict().items()}
    run = trained(net, inputs, prune_frozen=True)
    assert len(run.optimizer.params) == len(trains)
    changed = {n for n, t in net.state_dict().items() if (t.numpy() != before[n]).any()}
    assert changed == set(trains)
    assert run.history.losses[-1] < run.history.losses[0]
    adapted = net(*inputs).numpy()
    assert np.abs(adapted - plain).max() > 1e-3
    assert ft.merge_lora(net) == expected and not list(net.parametrized())
    np.testing.assert_allclose(net(*inputs).numpy(), adapted, rtol=1e-5, atol=1e-6)
    assert list(net.state_dict()) == list(make().state_dict())


def test_saved_apart_and_loaded_onto_the_base(case, tmp_path):
    make, net, patterns, inputs, expected = case
    base = {n: t.numpy() for n, t in net.state_dict().items()}
    ft.add_lora(net, patterns, rank=2, alpha=3)
    head = [n for n in base if n.startswith("head.")]
    ft.train_only(net, ["*.lora.*", *head])
    trained(net, inputs)
    ft.save_lora(net, tmp_path / "adapter.safetensors", also=head)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 8000
    other = make()
    other.load_state_dict(base)
    for _ in range(2):  # a second time replaces the first
        assert ft.load_lora(other, tmp_path / "adapter.safetensors") == expected
    other.eval()
    net.eval()
    np.testing.assert_allclose(other(*inputs).numpy(), net(*inputs).numpy(), rtol=1e-5, atol=1e-5)
    ft.remove_lora(other)
    assert list(other.state_dict()) == list(make().state_dict())


def test_the_gradient_is_that_of_the_factors():
    layer = td.nn.Linear(5, 4)
    ft.add_lora(layer, rank=2, alpha=6)
    adapter = next(iter(layer.parametrized()))[2]
    a, b = (rng.standard_normal(tuple(p.shape)).astype(np.float32) for p in (adapter.a, adapter.b))
    adapter.a.assign(td.tensor(a))
    adapter.b.assign(td.tensor(b))
    x, ct = (rng.standard_normal(s).astype(np.float32) for s in ((7, 5), (7, 4)))
    (layer(td.tensor(x)) * td.tensor(ct)).sum().backward()
    whole = ct.T @ x  # of the weight
    np.testing.assert_allclose(adapter.b.grad.numpy(), 3 * whole @ a.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter.a.grad.numpy(), 3 * b.T @ whole, rtol=1e-4, atol=1e-5)


def test_convolutions_of_a_graph_can_have_adapters():
    net = models.load(models.classifier())
    plain = net(models.IMAGES).numpy()
    assert ft.add_lora(net, "conv1*, fc*", rank=2) == ["conv1.weight", "fc.weight"]
    np.testing.assert_allclose(net(models.IMAGES).numpy(), plain, atol=1e-6)


def test_errors(tmp_path):
    net = layered()
    for call, error, message in (
        (lambda: ft.add_lora(td.nn.ReLU()), td.ArgumentsError, "nothing to put LoRA on"),
        (lambda: ft.add_lora(net, "0.bias"), td.ArgumentsError, "'0.bias' fits no parameter"),
        (lambda: ft.add_lora(net, rank=9), td.AttributeValueError, "smaller side of 0.weight"),
        (lambda: ft.add_lora(net, rank=0), td.AttributeValueError, "rank >= 1"),
        (lambda: ft.save_lora(net, tmp_path / "x"), td.ArgumentsError, "no LoRA adapters"),
    ):
        with pytest.raises(error, match=message):
            call()
    ft.add_lora(net, rank=2)
    with pytest.raises(td.ArgumentsError, match="already"):
        ft.add_lora(net, rank=2)
    ft.save_lora(net, tmp_path / "a.safetensors")
    td.save_checkpoint(tmp_path / "b.safetensors", net)
    with pytest.raises(td.CheckpointError, match="no LoRA adapters of Treadle"):
        ft.load_lora(layered(), tmp_path / "b.safetensors")
    with pytest.raises(td.CheckpointError, match="does not fit a weight of shape|no weights"):
        ft.load_lora(td.nn.Sequential(td.nn.Linear(5, 8), td.nn.ReLU(), td.nn.Linear(8, 3)), tmp_path / "a.safetensors")
    with pytest.raises(td.CheckpointError, match="no weights 2.weight"):
        ft.load_lora(td.nn.Sequential(td.nn.Linear(6, 8)), tmp_path / "a.safetensors")


@pytest.mark.parametrize("merge", [False, True])
def test_exported_with_adapters_apart_or_merged(case, tmp_path, merge):
    ort = pytest.importorskip("onnxruntime")
    _, net, patterns, inputs, expected = case
    ft.add_lora(net, patterns, rank=2)
    ft.train_only(net, "*.lora.*")
    trained(net, inputs)
    specs = net.body.inputs if hasattr(net, "body") else [td.spec(("batch", 6))]
    td.onnx.save(net, tmp_path / "net.onnx", *specs, merge=merge)
    names = {t.name for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert any(n.endswith("lora.a") for n in names) is not merge
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs)})[0]
    np.testing.assert_allclose(theirs, net(*inputs).numpy(), rtol=1e-5, atol=1e-5)
