"""Choosing parameters and finding layers, by names that people and exporters give."""

import pytest

import treadle as td

from . import models

ft = td.finetune


def test_patterns_of_modules_and_of_node_paths():
    net = models.load(models.encoder())
    own = ft.aliases(net)
    assert own["onnx::MatMul_0"] == ("encoder.layer.0.query.MatMul",)
    assert own["embeddings.word.weight"] == ("embeddings.word.Gather",)
    assert ft.select(net, "encoder.layer.1.query.*") == ["onnx::MatMul_100", "encoder.layer.1.query.bias"]
    assert ft.select(net, "*.query.MatMul, *.key.MatMul, !*layer.0*") == ["onnx::MatMul_100", "onnx::MatMul_101"]
    everything = ft.select(net, "*")
    assert ft.select(net, ["!embeddings.*", "embeddings.word*"]) == everything[:1] + everything[3:]
    with pytest.raises(td.ArgumentsError, match="'encoder.layer.7.*' fits no parameter; there are for example encoder"):
        ft.select(net, "encoder.layer.7.*")


def test_freezing_unfreezing_and_counting():
    net = models.load(models.encoder())
    total = ft.summary(net)["parameters"]
    assert ft.summary(net) == {"parameters": total, "trainable": total}
    assert len(ft.freeze(net)) == len(ft.parameters(net)) and ft.summary(net)["trainable"] == 0
    ft.unfreeze(net, "*norm.*")
    assert ft.summary(net)["trainable"] == 4 * 8
    assert ft.train_only(net, "*word*") == ["embeddings.word.weight"] and ft.summary(net)["trainable"] == 160


def test_bitfit_trains_what_is_added():
    net = ft.add_head(models.load(models.encoder()), 3, pool="mean", mask="mask")
    names = ft.bitfit(net, also="head.weight")
    assert all(n.endswith("bias") or n == "head.weight" for n in names) and len(names) == 1 + 2 * 4 + 2 + 1 + 1
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(names)
    with pytest.raises(td.ArgumentsError, match="biases"):
        ft.bitfit(td.nn.Linear(3, 3, bias=False))


def test_layers_are_found_by_numbered_names():
    net = ft.add_head(models.load(models.encoder(layers=3)), 3, pool="mean")
    found = ft.layers(net)
    assert [len(layer) for layer in found] == [3, 10, 10, 10, 2]
    assert "body.onnx::MatMul_109" in found[2] and found[-1] == ["head.weight", "head.bias"]
    rates = ft.layerwise_lr(net, 0.5)
    assert rates["head.bias"] == 1 and rates["body.onnx::MatMul_0"] == 0.125
    assert rates["body.embeddings.word.weight"] == 0.0625
    by_hand = ft.layers(net, ["*word*", "*layer.0*"])
    assert by_hand[0] == ["body.embeddings.word.weight"] and len(by_hand[1]) == 10 and len(by_hand) == 3
    stages = ft.gradual(net, epochs=2, last=5)
    assert [s.epochs for s in stages] == [2, 2, 2, 2, 5] and len(ft.select(net, stages[1].train)) == 12
    ft.freeze(net, "*word*, *norm*, *Norm*, *layer.0.*")
    assert [len(s.train) for s in ft.gradual(net)] == [2, 10, 18], "what is frozen stays frozen"
    plain = td.nn.Sequential(td.nn.Linear(2, 2), td.nn.ReLU(), td.nn.Linear(2, 2))
    assert ft.layers(plain) == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    named = models.load(models.classifier())
    assert [layer[0] for layer in ft.layers(named)] == ["conv0.weight", "bn0.weight", "conv1.weight", "bn1.weight",
                                                        "fc.weight"]


def test_bad_stages_and_decays():
    for call in (lambda: ft.Stage(epochs=0), lambda: ft.Stage(lr=0), lambda: ft.layerwise_lr(td.nn.Linear(2, 2), 0)):
        with pytest.raises(td.AttributeValueError):
            call()
    with pytest.raises(td.ArgumentsError, match="no floating-point parameters"):
        ft.layers(td.nn.ReLU())
