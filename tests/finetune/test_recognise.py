"""What an export took away is found, treated and reported."""

import numpy as np
import onnx
import pytest
from onnx import helper

import treadle as td

from . import models

ft = td.finetune
Y = np.array([0, 1, 2, 1])


def steps(net, count=3, lr=0.05, inputs=(models.IMAGES,)):
    net.train()
    opt = td.optim.SGD(net.parameters(), lr=lr)
    step = td.train_step(net, lambda m, *b: td.nn.functional.cross_entropy(m(*b[:-1]), b[-1]), opt)
    losses = [step(*inputs, Y).item() for _ in range(count)]
    net.eval()
    return losses


def test_batch_norms_keep_their_statistics_unless_told():
    net = models.load(models.classifier(softmax=False))
    report = ft.prepare(net)
    found = report["batch norm with fixed statistics"]
    assert found.where == ("/bn0/BatchNormalization", "/bn1/BatchNormalization") and "statistics stay" in found.treated
    before = {n: t.numpy() for n, t in net.state_dict().items()}
    losses = steps(net)
    after = {n: t.numpy() for n, t in net.state_dict().items()}
    assert losses[-1] < losses[0]
    still = {n for n in after if (after[n] == before[n]).all()}
    assert still == {f"bn{i}.{k}" for i in (0, 1) for k in ("mean", "var")}


def test_batch_norms_can_train_like_a_batch_norm_layer():
    net = models.load(models.classifier(softmax=False))
    plain = net(models.IMAGES).numpy()
    report = ft.prepare(net, batch_norm="train")
    assert "those of the batch" in report["batch norm with fixed statistics"].treated
    np.testing.assert_array_equal(net(models.IMAGES).numpy(), plain, "evaluation is as before")
    x = net.frame({"image": td.tensor(models.IMAGES)})
    x.run(net.nodes[:1])
    conv = x.lookup("c0").numpy()
    mean, var = net._buffers["bn0.mean"].numpy(), net._buffers["bn0.var"].numpy()
    steps(net, count=1, lr=1e-9)
    np.testing.assert_allclose(net._buffers["bn0.mean"].numpy(), 0.8 * mean + 0.2 * conv.mean((0, 2, 3)), rtol=1e-4)
    count = conv.size / conv.shape[1]
    np.testing.assert_allclose(net._buffers["bn0.var"].numpy(),
                               0.8 * var + 0.2 * conv.var((0, 2, 3)) * count / (count - 1), rtol=1e-4)


def test_folded_and_written_out_batch_norms_train_as_what_they_are():
    folded = models.load(models.classifier("folded", softmax=False))
    report = ft.recognise(folded)
    assert report["convolution with a folded batch norm"].where == ("/conv0/Conv", "/conv1/Conv")
    assert steps(folded)[-1] < steps(folded, count=1)[0] * 2
    affine = models.load(models.classifier("affine", softmax=False))
    report = ft.recognise(affine)
    assert report["batch norm written as scale and shift"].where == ("/bn0/Mul", "/bn1/Mul")
    assert {"scale0", "shift1"} <= set(ft.parameters(affine)) and len(report.findings) == 1


def test_dropouts_of_the_file_drop_again_while_training():
    net = models.load(models.classifier(dropout=True))
    plain = net(models.IMAGES).numpy()
    report = ft.prepare(net)
    assert "at the ratio of the file" in report["dropout that passes on"].treated
    np.testing.assert_array_equal(net(models.IMAGES).numpy(), plain)
    net.train()
    td.random.seed(0)
    assert (net(models.IMAGES).numpy() != net(models.IMAGES).numpy()).any()
    quiet = models.load(models.classifier(dropout=True))
    assert "nothing is dropped" in str(ft.prepare(quiet, dropout=0))
    quiet.train()
    np.testing.assert_array_equal(quiet(models.IMAGES).numpy(), plain)


def test_removed_dropouts_are_brought_back_where_a_transformer_has_them():
    net = models.load(models.encoder())
    where = ft.recognise(net)["place of a removed dropout"].where
    assert where == ("/encoder/layer.0/Softmax", "/encoder/layer.1/Softmax", "/encoder/layer.0.output/Add",
                     "/encoder/layer.1.output/Add")
    ft.prepare(net, dropout=0.5)
    same = net(models.IDS, models.MASK).numpy()
    np.testing.assert_array_equal(net(models.IDS, models.MASK).numpy(), same)
    net.train()
    run = td.compile(net)
    assert (run(models.IDS, models.MASK).numpy() != run(models.IDS, models.MASK).numpy()).any()


def test_a_probability_is_cut_off_on_request():
    net = models.load(models.classifier())
    assert "logits=True" in str(ft.recognise(net)) and "/softmax" in str(ft.recognise(net))
    probabilities = net(models.IMAGES).numpy()
    ft.prepare(net, logits=True)
    logits = net(models.IMAGES).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    assert net.output_names == ["logits"]


def test_tied_weights_fused_and_quantised_nodes_and_norms_in_steps():
    table = models.rng().standard_normal((100, 50)).astype(np.float32)
    node = helper.make_node
    model = models.built(
        [node("Gather", ["table", "ids"], ["e"], "/look"),
         node("FastGelu", ["e"], ["g"], "/gelu", domain="com.microsoft"),
         node("ReduceMean", ["g"], ["m"], "/mean", axes=[-1]), node("Sub", ["g", "m"], ["d"], "/sub"),
         node("Mul", ["d", "d"], ["s"], "/square"), node("ReduceMean", ["s"], ["v"], "/var", axes=[-1]),
         node("Sqrt", ["v"], ["r"], "/root"), node("Div", ["d", "r"], ["n"], "/div"),
         node("MatMul", ["n", "output"], ["y"], "/out")],
        {"table": table, "output": table.T[:, :100].copy().T.reshape(100, 50).T.copy()},
        [("ids", models.INT, ["n"])], [("y", ["n", 100])], opset=13)
    net = models.load(model)
    report = ft.recognise(net)
    assert report["fused activation or norm"].where == ("/gelu",)
    assert report["layer norm written in single steps"].where == ("/mean",)
    assert "one tensor stored twice" not in report  # transposed: another layout
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    copy.graph.node[0].input[0] = "again"
    again = onnx.numpy_helper.from_array(table, "again")
    copy.graph.initializer.append(again)
    copy.graph.node.append(node("Gather", ["table", "ids"], ["z"], "/look2"))
    copy.graph.output.append(helper.make_tensor_value_info("z", models.FLOAT, ["n", 50]))
    tied = models.load(copy)
    report = ft.prepare(tied, tie=True)
    assert report["one tensor stored twice"].where == ("table = again",)
    assert tied._parameters["again"] is tied._parameters["table"]
    assert "again" not in dict(tied.named_parameters())


def test_reports_as_text_and_table():
    net = models.load(models.classifier(dropout=True))
    report = ft.recognise(net)
    text = str(report)
    assert f"{report.trainable:,} numbers are parameters" in text and 'batch_norm="train"' in text
    assert report.constant >= 2 * (4 + 6)
    assert report.table().row_count == len(report.findings) == 3
    plain = models.load(models.classifier("none", softmax=False))
    assert "nothing was assumed" in str(ft.recognise(plain))
    for call, error, message in (
        (lambda: ft.recognise(td.nn.Linear(2, 2)), td.ArgumentsError, "no imported graph"),
        (lambda: ft.prepare(net, batch_norm="live"), td.AttributeValueError, "batch_norm"),
        (lambda: ft.prepare(net, dropout=1.0), td.AttributeValueError, r"\[0, 1\)"),
    ):
        with pytest.raises(error, match=message):
            call()
