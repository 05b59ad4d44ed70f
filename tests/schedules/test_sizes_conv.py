"""Convolutions of images whose number and sizes are known only when they run."""

import pytest
from lowered import check_sizes, combinations, graph_of

from treadle.ir.context import emit
from treadle.ir.dims import Dim

B, H, W = Dim("b"), Dim("h"), Dim("w")
IMAGES = combinations(b=(0, 1, 3), h=(1, 7), w=(1, 2, 5, 16, 31))
BATCHES = combinations(b=(0, 1, 2, 5))


def flags(rank, stride=1, padding=0, dilation=1, groups=1, channels_last=False):
    return {"stride": (stride,) * rank, "padding": ((padding, padding),) * rank, "dilation": (dilation,) * rank,
            "groups": groups, "channels_last": channels_last}


def conv(**given):
    return lambda x, w: emit("conv", x, w, **flags(x.rank - 2, **given))


def with_relu(x, w, bias):
    y = emit("conv", x, w, **flags(2, padding=1)) + bias
    return emit("maximum", y, y * 0.0)


def transposed(sizes, **given):
    return lambda dy, w: emit("conv_input_grad", dy, w, input_spatial=sizes, **flags(dy.rank - 2, **given))


CASES = {
    "3x3": (conv(padding=1), IMAGES, (B, 8, H, W), (40, 8, 3, 3)),
    "no padding": (conv(), IMAGES, (B, 8, H + 2, W + 2), (40, 8, 3, 3)),
    "stride 2": (conv(stride=2, padding=1), IMAGES, (B, 5, H, W), (16, 5, 3, 3)),
    "dilation 2": (conv(padding=2, dilation=2), IMAGES, (B, 5, H, W), (16, 5, 3, 3)),
    "7x7 of three channels": (conv(stride=2, padding=3), IMAGES, (B, 3, H, W), (24, 3, 7, 7)),
    "1x1": (conv(), IMAGES, (B, 24, H, W), (40, 24, 1, 1)),
    "1x1, stride 2": (conv(stride=2), IMAGES, (B, 24, H, W), (40, 24, 1, 1)),
    "groups": (conv(padding=1, groups=2), IMAGES, (B, 16, H, W), (40, 8, 3, 3)),
    "depthwise": (conv(padding=1, groups=24), IMAGES, (B, 24, H, W), (24, 1, 3, 3)),
    "depthwise, 5x5, stride 2": (conv(padding=2, stride=2, groups=24), IMAGES, (B, 24, H, W), (24, 1, 5, 5)),
    "bias and relu": (with_relu, IMAGES, (B, 8, H, W), (40, 8, 3, 3), (40, 1, 1)),
    "batch": (conv(padding=1), BATCHES, (B, 8, 9, 14), (40, 8, 3, 3)),
    "batch of 1x1": (conv(), BATCHES, (B, 8, 9, 14), (40, 8, 1, 1)),
    "signals": (conv(padding=1), combinations(b=(1, 3), w=(1, 5, 16, 40)), (B, 8, W), (20, 8, 3)),
    "long signals": (conv(stride=4), combinations(b=(1, 3), w=(1, 60)), (B, 1, W + 9), (20, 1, 10)),
    "volumes": (conv(padding=1), combinations(b=(1, 2), h=(1, 4), w=(1, 9)), (B, 3, H, 3, W), (8, 3, 3, 3, 3)),
    "transposed": (transposed((H, W), padding=1), IMAGES, (B, 16, H, W), (16, 8, 3, 3)),
    "transposed, stride 2": (transposed((H * 2, W * 2), stride=2), IMAGES, (B, 16, H, W), (16, 8, 2, 2)),
    "transposed, 1x1": (transposed((H, W)), IMAGES, (B, 16, H, W), (16, 8, 1, 1)),
    "weights of any size": (conv(), combinations(b=(1, 2), h=(1, 3), w=(1, 4)), (B, H, W + 3, 9), (5, H, W, 3)),
    "bfloat16": (conv(padding=1), BATCHES, ((B, 8, 9, 14), "bfloat16"), ((40, 8, 3, 3), "bfloat16")),
    "integers": (conv(padding=1), BATCHES, ((B, 2, 5, 6), "int32"), ((4, 2, 3, 3), "int32")),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name):
    fn, sizes, *specs = CASES[name]
    check_sizes(graph_of(fn, *specs), sizes, tol=2e-4 if name != "bfloat16" else 5e-2)


HALF = ((H - 1) // 2 + 1, (W - 1) // 2 + 1)
GRADIENTS = {
    "3x3": (8, 16, 3, {"padding": 1}),
    "groups": (8, 16, 3, {"padding": 1, "groups": 2}),
    "1x1": (24, 40, 1, {}),
    "1x1, channels last": (24, 40, 1, {"channels_last": True}),
    "three channels, 7x7, stride 2": (3, 24, 7, {"padding": 3, "stride": 2}),
    "stride 2": (12, 32, 3, {"padding": 1, "stride": 2}),
    "dilation 2": (5, 16, 3, {"padding": 2, "dilation": 2}),
    "depthwise": (24, 24, 3, {"padding": 1, "groups": 24}),
    "depthwise, 5x5, stride 2, channels last": (16, 16, 5, {"padding": 2, "stride": 2, "groups": 16,
                                                             "channels_last": True}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_to_weights(name):
    inner, out, kernel, given = GRADIENTS[name]
    last = given.get("channels_last", False)

    def image(channels, spatial):
        return (B, *spatial, channels) if last else (B, channels, *spatial)

    def gradient(x, dy):
        return emit("conv_weight_grad", x, dy, kernel_spatial=(kernel, kernel), **flags(2, **given))

    after = HALF if given.get("stride") == 2 else (H, W)
    check_sizes(graph_of(gradient, image(inner, (H, W)), image(out, after)), IMAGES, tol=2e-3)


@pytest.mark.parametrize("dtype, tol", [("float64", 1e-11), ("bfloat16", 5e-2)])
def test_gradients_to_weights_in_other_dtypes(dtype, tol):
    def gradient(x, dy):
        return emit("conv_weight_grad", x, dy, kernel_spatial=(3,), **flags(1, padding=1))

    check_sizes(graph_of(gradient, ((B, 8, W), dtype), ((B, 16, W), dtype)), combinations(b=(0, 1, 3), w=(1, 5, 33)),
                tol=tol)
