"""Attention over numbers of queries and keys that are known only when it runs."""

import pytest
from lowered import check_sizes, combinations, graph_of

from treadle.ir.context import emit
from treadle.ir.dims import Dim

B, N, M = Dim("b"), Dim("n"), Dim("m")
LENGTHS = combinations(b=(0, 2), n=(0, 1, 3, 4, 15, 16, 17, 31, 33, 100)) + combinations(b=(1,), n=(511, 513, 700))
CROSS = combinations(b=(2,), n=(1, 5, 17, 40), m=(1, 3, 16, 50, 600))


def attention(q, k, v, *mask):
    return emit("attention", q, k, v, *mask, scale=None, causal=False)


def causal(q, k, v):
    return emit("attention", q, k, v, scale=None, causal=True)


CASES = {
    "self": (attention, LENGTHS, *3 * [(B, 2, N, 32)]),
    "causal": (causal, LENGTHS, *3 * [(B, 2, N, 32)]),
    "a mask": (attention, CROSS, (B, 2, N, 32), (B, 2, M, 32), (B, 2, M, 40), ((B, 1, N, M), "bool")),
    "an additive mask": (attention, CROSS, (B, 2, N, 32), (B, 2, M, 32), (B, 2, M, 8), (B, 1, 1, M)),
    "static batch": (attention, combinations(n=(1, 30, 65)), *3 * [(3, 2, N, 16)]),
    "batches": (attention, combinations(b=(0, 1, 5)), (B, 2, 9, 16), (B, 2, 40, 16), (B, 2, 40, 16)),
    "batches of short ones": (attention, combinations(b=(0, 1, 5)), (B, 2, 5, 4), (B, 2, 7, 4), (B, 2, 7, 6)),
    "bfloat16": (attention, combinations(n=(1, 30, 65)), *3 * [((3, 2, N, 32), "bfloat16")]),
    "features that are no vectors": (causal, combinations(b=(1, 3), n=(1, 2, 3, 7, 21)), *3 * [(B, 2, N, 24)]),
    "few keys of many queries": (attention, combinations(n=(1, 70), m=(1, 7, 15)), (2, N, 32), (2, M, 32), (2, M, 5)),
    "a shared key": (attention, CROSS, (B, 2, N, 48), (B, 1, M, 48), (1, 2, M, 72), (N, M)),
    "float64": (causal, combinations(b=(2,), n=(1, 3, 20)), *3 * [((B, N, 12), "float64")]),
    "few in float16": (attention, combinations(b=(1, 2), n=(1, 3), m=(1, 9, 530)),
                       *(((B, 2, size, 32), "float16") for size in (N, M, M))),
    "one query": (attention, combinations(m=(1, 30, 1700)), (2, 2, 1, 16), (2, 2, M, 16), (2, 2, M, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    fn, sizes, *specs = CASES[name]
    tol = {"bfloat16": 3e-2, "few in float16": 3e-3}.get(name, 1e-4)
    kernels = check_sizes(graph_of(fn, *specs), sizes, tol=tol)
    assert name == "one query" or kernels == ["attention"]
