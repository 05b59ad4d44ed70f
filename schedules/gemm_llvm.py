"""The few things a GEMM needs that TIR cannot say, as LLVM IR that is imported into a kernel and inlined.

* `transpose`: a square tile of L x L elements, by log2(L) rounds of two-source shuffles on registers.
* `dot_bf16`: accumulate the products of bfloat16 pairs in float32 (AVX512_BF16's VDPBF16PS).
"""

from __future__ import annotations

import functools

TRANSPOSE = "treadle_transpose_{bits}x{lanes}"
DOT_BF16 = "treadle_dot_bf16_{lanes}"


def _shuffle(lanes: int, element: str, name: str, x: str, y: str, mask: list[int]) -> str:
    picks = ", ".join(f"i32 {i}" for i in mask)
    vector = f"<{lanes} x {element}>"
    return f"{name} = shufflevector {vector} {x}, {vector} {y}, <{lanes} x i32> <{picks}>"


@functools.cache
def transpose_ir(lanes: int, bits: int) -> str:
    """void transpose(ptr dst, i64 dst_stride, ptr src, i64 src_stride): dst[j][i] = src[i][j], strides in bytes.

    Round s exchanges the off-diagonal blocks of size s, s = 1, 2, 4...: Eklundh's in-place transposition (1972)."""
    element = f"i{bits}"
    vector = f"<{lanes} x {element}>"
    lines, rows = [], [f"%r0_{i}" for i in range(lanes)]
    for i in range(lanes):
        lines += [f"%so{i} = mul i64 %src_stride, {i}", f"%sp{i} = getelementptr i8, ptr %src, i64 %so{i}",
                  f"{rows[i]} = load {vector}, ptr %sp{i}, align 1"]
    size, step = 1, 1
    while size < lanes:
        after = list(rows)
        for i in (i for i in range(lanes) if not i & size):
            low = [k if not k & size else lanes + (k ^ size) for k in range(lanes)]
            high = [(k | size) if not k & size else lanes + k for k in range(lanes)]
            for row, mask in ((i, low), (i | size, high)):
                after[row] = f"%r{step}_{row}"
                lines.append(_shuffle(lanes, element, after[row], rows[i], rows[i | size], mask))
        rows, size, step = after, size * 2, step + 1
    for i in range(lanes):
        lines += [f"%do{i} = mul i64 %dst_stride, {i}", f"%dp{i} = getelementptr i8, ptr %dst, i64 %do{i}",
                  f"store {vector} {rows[i]}, ptr %dp{i}, align 1"]
    head = f"define void @{TRANSPOSE.format(bits=bits, lanes=lanes)}" \
           "(ptr %dst, i64 %dst_stride, ptr %src, i64 %src_stride) alwaysinline {"
    return "\n".join([head, *lines, "ret void", "}", ""])


@functools.cache
def dot_bf16_ir(lanes: int) -> str:
    """<L x float> dot_bf16(<L x float> acc, <L x i32> a, <L x i32> b), each i32 holding two bfloat16."""
    acc, word, half = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    intrinsic = f"@llvm.x86.avx512bf16.dpbf16ps.{lanes * 32}"
    return f"""declare {acc} {intrinsic}({acc}, {half}, {half})
define {acc} @{DOT_BF16.format(lanes=lanes)}({acc} %c, {word} %a, {word} %b) alwaysinline {{
%x = bitcast {word} %a to {half}
%y = bitcast {word} %b to {half}
%r = call {acc} {intrinsic}({acc} %c, {half} %x, {half} %y)
ret {acc} %r
}}
"""
