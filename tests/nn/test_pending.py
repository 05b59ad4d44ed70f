"""Parameters are drawn when they are asked for: the numbers, their parts, and what draws nothing."""

import numpy as np
import pytest

import treadle as td
from treadle.frontend import random
from treadle.frontend.nn import init
from treadle.frontend.pending import waiting

KINDS = {"uniform": init.uniform(-1, 1), "normal": init.normal(0, 2), "blank": init.normal(blank=3),
         "constant": init.constant(3), "kaiming": init.kaiming_uniform(), "xavier": init.xavier_normal(),
         "truncated": init.truncated_normal(), "orthogonal": init.orthogonal()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 5), (1031, 600), (3, 8, 3)])
def test_a_part_holds_the_numbers_of_the_whole(kind, shape):
    td.random.seed(5)
    drawing = KINDS[kind].later(shape, "float32")
    whole = drawing.part(tuple(slice(0, n) for n in shape))
    rows, columns = slice(shape[0] // 3, shape[0]), slice(1, shape[1] - 1)
    part = drawing.part((rows, columns, *(slice(0, n) for n in shape[2:])))
    np.testing.assert_array_equal(part, whole[rows, columns])
    td.random.seed(5)
    np.testing.assert_array_equal(KINDS[kind](shape), whole)


def test_pieces_of_the_stream_are_the_stream():
    """What is drawn chunk by chunk is what NumPy draws at once."""
    for kind, draw in (("normal", lambda rng, n: 2 * rng.standard_normal(n, np.float32)),
                       ("uniform", lambda rng, n: -1 + 2 * rng.random(n, np.float32))):
        td.random.seed(1)
        expected = draw(random.numpy_generator(), (1031, 601))
        td.random.seed(1)
        np.testing.assert_array_equal(KINDS[kind]((1031, 601)), expected)


def test_nothing_is_drawn_until_somebody_looks():
    td.random.seed(0)
    model = td.nn.Sequential(td.nn.Linear(4, 3), td.nn.LayerNorm(3), td.nn.Embedding(5, 3, padding_idx=1))
    model.to("float64")
    opt = td.optim.AdamW(model.parameters())
    tensors = [*model.parameters(), *(t for slots in opt.state for t in slots.values())]
    assert all(waiting(t._value) for t in tensors)
    assert model[0].weight.dtype == "float64" and model[0].weight.requires_grad and model[0].weight.role == "parameter"
    first = model[0].weight.numpy()
    assert not waiting(model[0].weight._value) and waiting(model[0].bias._value)
    np.testing.assert_array_equal(model[0].weight.numpy(), first)
    assert not model[2].weight.numpy()[1].any() and model[2].weight.numpy()[0].any()
    td.random.seed(0)
    np.testing.assert_array_equal(td.nn.Linear(4, 3).weight.numpy(), first.astype(np.float32))


def test_what_is_assigned_is_not_drawn_any_more():
    layer = td.nn.Linear(2, 2)
    layer.weight.assign(np.eye(2))
    np.testing.assert_array_equal(layer.weight.numpy(), np.eye(2))
    layer.load_state_dict({"weight": np.ones((2, 2)), "bias": np.ones(2)})
    np.testing.assert_array_equal(layer(np.ones((1, 2), np.float32)).numpy(), [[3, 3]])
