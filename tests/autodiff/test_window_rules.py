"""Rules of convolution and pooling, first and second order."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import check

from treadle.ir.context import emit

rng = np.random.default_rng(2)

# x, w, stride, padding, dilation, groups
CONVS = [
    ((2, 3, 7), (4, 3, 3), (1,), ((0, 0),), (1,), 1),
    ((2, 4, 9), (6, 2, 3), (2,), ((2, 1),), (2,), 2),
    ((1, 3, 6, 5), (2, 3, 3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1), 1),
    ((2, 4, 7, 8), (4, 1, 3, 3), (2, 3), ((1, 1), (1, 1)), (1, 2), 4),
    ((1, 2, 3, 4, 5), (3, 2, 2, 2, 2), (1, 2, 2), ((0, 0), (1, 0), (0, 1)), (1, 1, 1), 1),
    ((0, 2, 4, 4), (3, 2, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
]


def ids(case):
    return "x".join(map(str, case[0])) if isinstance(case, tuple) else None


def last(shape, channels_last):
    """The shape with the channels moved to the end."""
    return (shape[0], *shape[2:], shape[1]) if channels_last else shape


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CONVS, ids=ids)
def test_conv_and_its_transposes(case, channels_last):
    x, w, stride, padding, dilation, groups = case
    window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
              "channels_last": channels_last}
    xs, ws = rng.standard_normal(last(x, channels_last)), rng.standard_normal(w)
    out = tuple((s + lo + hi - d * (k - 1) - 1) // t + 1
                for s, k, t, (lo, hi), d in zip(x[2:], w[2:], stride, padding, dilation))
    dy = rng.standard_normal(last((x[0], w[0], *out), channels_last))
    check(lambda x, w: emit("conv", x, w, **window), xs, ws)
    check(lambda dy, w: emit("conv_input_grad", dy, w, input_spatial=x[2:], **window), dy, ws)
    check(lambda x, dy: emit("conv_weight_grad", x, dy, kernel_spatial=w[2:], **window), xs, dy)


POOLS = [
    ((2, 3, 8), (2,), (2,), ((0, 0),)),
    ((1, 2, 7, 6), (3, 2), (2, 1), ((1, 1), (0, 1))),
    ((1, 1, 4, 5, 4), (2, 2, 2), (1, 2, 2), ((0, 0), (0, 0), (1, 0))),
    ((1, 1, 3), (2,), (1,), ((3, 0),)),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", POOLS, ids=ids)
def test_pools(case, channels_last):
    shape, window, stride, padding = case
    x = rng.standard_normal(last(shape, channels_last))
    common = {"window": window, "stride": stride, "padding": padding, "channels_last": channels_last}
    if padding != ((3, 0),):  # a window of padding alone gives -inf: no finite difference
        check(lambda x: emit("max_pool", x, **common, dilation=(1,) * len(window))[0], x)
    for include in (True, False):
        check(lambda x, include=include: emit("avg_pool", x, **common, count_include_pad=include), x)


def test_max_pool_grad_drops_windows_of_padding():
    indices = np.array([[[-1, 0, 2]]], np.int32)
    check(lambda dy: emit("max_pool_grad", dy, emit("constant", value=indices), input_spatial=(3,)),
          rng.standard_normal((1, 1, 3)))


def test_dilated_max_pool():
    check(lambda x: emit("max_pool", x, window=(2, 2), stride=(1, 2), padding=((1, 0), (0, 0)), dilation=(2, 1))[0],
          rng.standard_normal((2, 2, 5, 6)))
