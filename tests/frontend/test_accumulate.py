"""Accumulated gradients against those of the whole batch, in f64: parts of other lengths, masked tokens, aux."""

import numpy as np
import pytest

import treadle as td
from treadle.frontend.accumulate import parts_of
from treadle.ir.errors import ArgumentsError

TOKENS, CLASSES = 4, 5


def batch(examples, masked):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((examples, TOKENS, 3)), rng.integers(0, CLASSES, (examples, TOKENS))
    if masked:
        y[0], y[3, :3], y[7:9] = -100, -100, -100
    return x, y


def loss_fn(model, x, y):
    return td.nn.functional.cross_entropy(model(x), y)


def stepped(data, loss_fn=loss_fn, dtype="float64", **options):
    """What a step gives, and the weights after it: SGD takes the gradient off."""
    td.random.seed(0)
    model = td.nn.Linear(3, CLASSES).to(dtype)
    step = td.train_step(model, loss_fn, td.optim.SGD(model.parameters(), lr=1.0), **options)
    return step(*data), model.weight.numpy()


def tokens(x, y):
    return (y != -100).sum()


@pytest.mark.parametrize(("masked", "weight"), [(False, None), (True, tokens)], ids=["examples", "tokens"])
@pytest.mark.parametrize("parts", [2, 3, 4, 10])
def test_parts_of_any_length_make_the_step_of_the_whole(parts, masked, weight):
    data = batch(10, masked)
    (loss, whole), (accumulated, got) = stepped(data), stepped(data, accumulate=parts, weight=weight)
    np.testing.assert_allclose(accumulated.numpy(), loss.numpy(), rtol=1e-12)
    np.testing.assert_allclose(got, whole, rtol=1e-12, atol=1e-14)


def test_without_a_weight_masked_tokens_count_as_others():
    data = batch(12, masked=True)
    assert np.abs(stepped(data, accumulate=4)[1] - stepped(data)[1]).max() > 1e-3


def test_how_a_batch_is_cut():
    assert parts_of(10, 4) == [(2, 3), (2, 2)] and parts_of(12, 4) == [(4, 3)] and parts_of(4, 4) == [(4, 1)]
    assert parts_of(20, 4, ranks=2) == [(2, 6), (2, 4)] and parts_of(9, 2, ranks=2) == [(1, 5), (1, 4)]


def test_aux_keeps_an_axis_of_parts():
    def with_aux(model, x, y):
        return loss_fn(model, x, y), {"first": x[0, 0, 0]}

    data = batch(10, False)
    (loss, aux), got = stepped(data, with_aux, accumulate=4)
    np.testing.assert_array_equal(aux["first"].numpy(), data[0][[0, 3, 6, 8], 0, 0])
    np.testing.assert_allclose(got, stepped(data)[1], rtol=1e-12, atol=1e-14)


def test_mixed_precision_sums_in_float32():
    data = [a.astype(np.float32) if a.dtype == np.float64 else a for a in batch(10, True)]
    (loss, whole), (accumulated, got) = (stepped(data, dtype="float32", amp="bfloat16", **options)
                                         for options in ({}, {"accumulate": 4, "weight": tokens}))
    np.testing.assert_allclose(accumulated.numpy(), loss.numpy(), rtol=1e-2)
    np.testing.assert_allclose(got, whole, rtol=3e-2, atol=3e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ArgumentsError, match=r"f64\[10,4,3\] of the batch does not divide into 11 parts"):
        stepped(batch(10, False), accumulate=11)
    with pytest.raises(ArgumentsError, match="have 10 and 9 examples, which do not divide into 4 parts alike"):
        stepped((batch(10, False)[0], batch(9, False)[1]), accumulate=4)
    with pytest.raises(ArgumentsError, match="give one number for a part of the batch, not bool"):
        stepped(batch(10, False), accumulate=2, weight=lambda x, y: y != -100)
    with pytest.raises(ArgumentsError, match="must be a function, got 3"):
        stepped(batch(10, False), accumulate=2, weight=3)

    def with_examples(model, x, y):
        return loss_fn(model, x, y), x[:, 0, 0]

    with pytest.raises(ArgumentsError, match="has another shape for shorter parts"):
        stepped(batch(10, False), with_examples, accumulate=4)
