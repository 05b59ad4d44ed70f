"""Heads on imported graphs and on modules."""

import numpy as np
import pytest

import treadle as td

from . import models

ft = td.finetune


@pytest.mark.parametrize("pool", ["mean", "max", "first"])
def test_pooling_counts_what_the_mask_says(pool):
    net = models.load(models.encoder())
    mask = models.MASK.copy()
    mask[1, 3:] = 0
    states = net(models.IDS, mask).numpy()
    headed = ft.add_head(net, 3, pool=pool, mask=None if pool == "first" else "mask")
    features = headed.features(td.tensor(models.IDS), td.tensor(mask)).numpy()
    whole = {"mean": states.mean(1), "max": states.max(1), "first": states[:, 0]}[pool]
    np.testing.assert_allclose(features[[0, 2, 3]], whole[[0, 2, 3]], rtol=1e-5, atol=1e-6)
    part = {"mean": states[1, :3].mean(0), "max": states[1, :3].max(0), "first": states[1, 0]}[pool]
    np.testing.assert_allclose(features[1], part, rtol=1e-5, atol=1e-6)
    assert headed(models.IDS, mask).shape == (4, 3)
    compiled = td.compile(headed)
    np.testing.assert_allclose(compiled(models.IDS, mask).numpy(), headed(models.IDS, mask).numpy(), 1e-4, 1e-5)


def test_a_graph_is_cut_at_its_old_head_and_what_only_that_needed_goes():
    net = models.load(models.classifier(dropout=True))
    images = td.tensor(models.IMAGES)
    whole = net.frame({"image": images})
    whole.run(net.nodes)
    flat, pooled = whole.lookup("flat").numpy(), whole.lookup("pooled").numpy()
    headed = ft.replace_head(net, 5)
    assert net.output_names == ["dropped"] and "fc.weight" not in dict(net.named_parameters())
    assert headed.head.in_features == 6 and headed(models.IMAGES).shape == (4, 5)
    np.testing.assert_allclose(headed.features(images).numpy(), flat, rtol=1e-5)
    spatial = ft.add_head(models.load(models.classifier()), 2, output="r1", pool="spatial", dropout=0.1)
    np.testing.assert_allclose(spatial.features(images).numpy(), pooled[..., 0, 0], rtol=1e-5)
    assert [n for n, _ in spatial.head.named_parameters()] == ["linear.weight", "linear.bias"]


def test_layers_of_a_module_are_replaced_in_place():
    net = td.nn.Sequential({"body": td.nn.Linear(4, 6), "act": td.nn.ReLU(), "out": td.nn.Linear(6, 2, bias=False)})
    assert ft.replace_head(net, 7) is net and net.out.out_features == 7 and net.out.bias is None
    ft.replace_head(net, 3, dropout=0.5)
    assert net(np.ones((2, 4), np.float32)).shape == (2, 3)
    ft.replace_head(net, td.nn.Identity(), at="out")
    assert net(np.ones((2, 4), np.float32)).shape == (2, 6)
    assert ft.add_head(net, 3, features=6)(np.ones((2, 4), np.float32)).shape == (2, 3)


def test_errors():
    encoder = models.load(models.encoder())
    plain = td.nn.Sequential(td.nn.ReLU())
    for call, message in (
        (lambda: ft.add_head(encoder, 3), r"features of type f32\[batch,seq,8\].*choose a pooling"),
        (lambda: ft.add_head(encoder, 3, pool="sum"), "no pooling 'sum'"),
        (lambda: ft.add_head(encoder, 3, pool="mean", mask="attention"), "no input 'attention'; it has ids, mask"),
        (lambda: ft.add_head(encoder, 3, output="nowhere"), "no value 'nowhere'"),
        (lambda: ft.add_head(plain, 3), "features=..."),
        (lambda: ft.add_head(plain, 3, output="x"), "no imported graph"),
        (lambda: ft.replace_head(encoder, 3), "no classifier was found before the output 'x2'"),
        (lambda: ft.replace_head(plain, 3), "no linear layer"),
        (lambda: ft.replace_head(plain, 3, at="1"), "no layer '1'"),
        (lambda: ft.replace_head(plain, 3, at="0"), "0 is a ReLU, not linear"),
    ):
        with pytest.raises(td.TreadleError, match=message):
            call()
