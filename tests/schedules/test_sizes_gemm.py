"""Products of sizes that are known only when they run."""

import pytest
from lowered import check_sizes, combinations, graph_of

from treadle.ir.context import emit
from treadle.ir.dims import Dim

B, N = Dim("b"), Dim("n")
ONE = combinations(b=(0, 1, 2, 3, 4, 5, 11, 12, 13, 14, 15, 40, 131))
TWO = combinations(b=(0, 1, 3, 9, 13, 14, 50), n=(0, 1, 2, 15, 16, 17, 33, 100))


def product(x, y, **flags):
    return emit("matmul", x, y, **{"transpose_x": False, "transpose_y": False, "out_dtype": None, **flags})


def turned(x, y):
    return product(x, y, transpose_y=True)


def gradient(x, y):
    return product(x, y, transpose_x=True)


CASES = {
    "rows": (product, ONE, (B, 96), (96, 80)),
    "rows, transposed weights": (turned, ONE, (B, 96), (80, 96)),
    "rows, odd sizes": (turned, ONE, (B, 33), (77, 33)),
    "rows, transposed": (gradient, ONE, (96, B), (96, 80)),
    "rows of few columns": (product, ONE, (B, 96), (96, 3)),
    "depth": (gradient, ONE, (B, 96), (B, 80)),
    "long depth": (gradient, combinations(b=(1, 383, 384, 385, 1500)), (B, 30), (B, 40)),
    "rows and columns": (product, TWO, (B, 40), (40, N)),
    "rows and transposed columns": (turned, TWO, (B, 40), (N, 40)),
    "depth and columns": (product, TWO, (20, B), (B, N)),
    "a batch folded into rows": (lambda x, w, c: emit("tanh", product(x, w) + c) * 2.0, TWO, (B, N, 40), (40, 24),
                                 (24,)),
    "a residual": (lambda x, w, r: emit("exp", product(x, w)) + r, TWO, (B, N, 40), (40, 24), (B, N, 24)),
    "a mask of each batch": (lambda x, w, r: product(x, w) * r, TWO, (B, N, 40), (40, 24), (B, 1, 1)),
    "all of them": (lambda x, y, r: product(x, y) + r, TWO, (B, N), (N, B), (B,)),
    "scores": (turned, TWO, (B, 2, N, 40), (B, 2, N, 40)),
    "values": (product, TWO, (B, 2, N, N), (B, 2, N, 40)),
    "doubles": (product, TWO, ((B, 20), "float64"), ((20, N), "float64")),
    "integers": (product, TWO, ((B, N), "int32"), ((N, 20), "int32")),
    "bfloat16": (product, ONE, ((B, 96), "bfloat16"), ((96, 80), "bfloat16")),
    "bfloat16, depth": (gradient, ONE, ((B, 96), "bfloat16"), ((B, 80), "bfloat16")),
    "float16": (turned, ONE, ((B, 33), "float16"), ((40, 33), "float16")),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name):
    fn, sizes, *specs = CASES[name]
    wide = not any("float16" in str(s) for s in specs)
    assert len(check_sizes(graph_of(fn, *specs), sizes, tol=2e-4 if wide else 5e-2)) == 1
