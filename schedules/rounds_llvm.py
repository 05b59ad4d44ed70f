"""The protocol of `ir/rounds.py` as LLVM IR that is imported into a kernel: what TIR cannot say are atomic accesses.

* `i64 begin(record)`: the rank has come; gives the address of its slot in the round that begins, or 0: Python does it.
* `i32 meet(record, ranks)`: the slot is filled; waits for the others. 0 if one of them is late.
* `i64 slot(record, rank)`: after that, the address of a rank's slot.
* `i64 place(record)`: this rank's number.
* `void put(address, data, offset, bytes)`, `void get(data, offset, address, bytes)`: copies from a tensor into a slot,
  and from a slot into a tensor.
* `void end(record)`: the rank has passed.

Atomic loads and stores with acquire and release are right on every machine; on x86 they cost nothing.
"""

from __future__ import annotations

import functools

from ..ir import rounds as R

BEGIN, MEET, SLOT, PLACE, PUT, GET, END = (
    f"treadle_round_{name}" for name in ("begin", "meet", "slot", "place", "put", "get", "end"))
YIELDS = 100  # times that the core is left to others before Python takes over
_CLOCK_MONOTONIC = 1
_PAUSE = {"x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
          "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)")}

_COMMON = f"""
declare i32 @clock_gettime(i32, ptr)
declare i32 @sched_yield()
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
define i64 @treadle_round_clock() alwaysinline {{
  %time = alloca [2 x i64], align 8
  %failed = call i32 @clock_gettime(i32 {_CLOCK_MONOTONIC}, ptr %time)
  %seconds = load i64, ptr %time, align 8
  %at = getelementptr i64, ptr %time, i64 1
  %rest = load i64, ptr %at, align 8
  %whole = mul i64 %seconds, 1000000000
  %now = add i64 %whole, %rest
  ret i64 %now
}}
define ptr @treadle_round_group(ptr %record) alwaysinline {{
  %at = getelementptr i64, ptr %record, i64 {R.GROUP}
  %group = load ptr, ptr %at, align 8
  ret ptr %group
}}
define ptr @treadle_round_memory(ptr %group, i64 %rank) alwaysinline {{
  %index = add i64 %rank, {R.MEMORY}
  %at = getelementptr i64, ptr %group, i64 %index
  %memory = load ptr, ptr %at, align 8
  ret ptr %memory
}}
define i64 @treadle_round_rank(ptr %group) alwaysinline {{
  %at = getelementptr i64, ptr %group, i64 {R.PLACE}
  %rank = load i64, ptr %at, align 8
  ret i64 %rank
}}
define i64 @{PLACE}(ptr %record) alwaysinline {{
  %group = call ptr @treadle_round_group(ptr %record)
  %rank = call i64 @treadle_round_rank(ptr %group)
  ret i64 %rank
}}
define void @{PUT}(i64 %address, ptr %data, i64 %offset, i64 %bytes) alwaysinline {{
  %target = inttoptr i64 %address to ptr
  %source = getelementptr i8, ptr %data, i64 %offset
  call void @llvm.memcpy.p0.p0.i64(ptr %target, ptr %source, i64 %bytes, i1 false)
  ret void
}}
define void @{GET}(ptr %data, i64 %offset, i64 %address, i64 %bytes) alwaysinline {{
  %target = getelementptr i8, ptr %data, i64 %offset
  %source = inttoptr i64 %address to ptr
  call void @llvm.memcpy.p0.p0.i64(ptr %target, ptr %source, i64 %bytes, i1 false)
  ret void
}}
define ptr @treadle_round_own(ptr %group) alwaysinline {{
  %rank = call i64 @treadle_round_rank(ptr %group)
  %memory = call ptr @treadle_round_memory(ptr %group, i64 %rank)
  ret ptr %memory
}}
define i64 @treadle_round_start(ptr %group, ptr %memory, i64 %round) alwaysinline {{
  %size = load i64, ptr %group, align 8
  %turn = and i64 %round, 1
  %start = mul i64 %turn, %size
  %offset = add i64 %start, {R.HEADER}
  %base = ptrtoint ptr %memory to i64
  %place = add i64 %base, %offset
  ret i64 %place
}}
define i64 @{SLOT}(ptr %record, i64 %rank) alwaysinline {{
  %group = call ptr @treadle_round_group(ptr %record)
  %own = call ptr @treadle_round_own(ptr %group)
  %round = load i64, ptr %own, align 8
  %memory = call ptr @treadle_round_memory(ptr %group, i64 %rank)
  %place = call i64 @treadle_round_start(ptr %group, ptr %memory, i64 %round)
  ret i64 %place
}}
define i64 @{BEGIN}(ptr %record) alwaysinline {{
  %watched = getelementptr i64, ptr %record, i64 {R.WATCH}
  %watch = load ptr, ptr %watched, align 8
  %closed.at = getelementptr i64, ptr %watch, i64 {R.CLOSED}
  %closed = load i64, ptr %closed.at, align 8
  %open = icmp eq i64 %closed, 0
  br i1 %open, label %come, label %aside
aside:
  store i64 {R.ASIDE}, ptr %record, align 8
  ret i64 0
come:
  store i64 {R.BEGUN}, ptr %record, align 8
  %calls.at = getelementptr i64, ptr %watch, i64 {R.CALL}
  %calls = load i64, ptr %calls.at, align 8
  %more = add i64 %calls, 1
  store i64 %more, ptr %calls.at, align 8
  %state = getelementptr i64, ptr %watch, i64 {R.STATE}
  store i64 {R.WAITING}, ptr %state, align 8
  %shown = getelementptr i64, ptr %watch, i64 {R.AT}
  %text = getelementptr i64, ptr %record, i64 {R.TEXT}
  call void @llvm.memcpy.p0.p0.i64(ptr align 8 %shown, ptr align 8 %text, i64 {R.LABEL}, i1 false)
  %now = call i64 @treadle_round_clock()
  %entered = getelementptr i64, ptr %record, i64 {R.ENTERED}
  store i64 %now, ptr %entered, align 8
  %group = call ptr @treadle_round_group(ptr %record)
  %own = call ptr @treadle_round_own(ptr %group)
  %before = load i64, ptr %own, align 8
  %round = add i64 %before, 1
  %place = call i64 @treadle_round_start(ptr %group, ptr %own, i64 %round)
  ret i64 %place
}}
define void @{END}(ptr %record) alwaysinline {{
  %now = call i64 @treadle_round_clock()
  %entered.at = getelementptr i64, ptr %record, i64 {R.ENTERED}
  %entered = load i64, ptr %entered.at, align 8
  %took = sub i64 %now, %entered
  %time.at = getelementptr i64, ptr %record, i64 {R.NANOSECONDS}
  %time = load i64, ptr %time.at, align 8
  %sum = add i64 %time, %took
  store i64 %sum, ptr %time.at, align 8
  %calls.at = getelementptr i64, ptr %record, i64 {R.CALLS}
  %calls = load i64, ptr %calls.at, align 8
  %more = add i64 %calls, 1
  store i64 %more, ptr %calls.at, align 8
  %watched = getelementptr i64, ptr %record, i64 {R.WATCH}
  %watch = load ptr, ptr %watched, align 8
  %state = getelementptr i64, ptr %watch, i64 {R.STATE}
  store i64 {R.COMPUTING}, ptr %state, align 8
  store i64 {R.DONE}, ptr %record, align 8
  ret void
}}
"""

_MEET = """
define i32 @{MEET}(ptr %record, i64 %ranks) alwaysinline {{
  %group = call ptr @treadle_round_group(ptr %record)
  %own = call ptr @treadle_round_own(ptr %group)
  %before = load i64, ptr %own, align 8
  %round = add i64 %before, 1
  store atomic i64 %round, ptr %own release, align 8
  %looks.at = getelementptr i64, ptr %group, i64 {LOOKS}
  %looks = load i64, ptr %looks.at, align 8
  br label %next
next:
  %rank = phi i64 [ 0, %0 ], [ %following, %come ]
  %yields = phi i64 [ {YIELDS}, %0 ], [ %yields.left, %come ]
  %all = icmp eq i64 %rank, %ranks
  br i1 %all, label %met, label %other
other:
  %memory = call ptr @treadle_round_memory(ptr %group, i64 %rank)
  br label %look
look:
  %yields.left = phi i64 [ %yields, %other ], [ %yields.left, %again ], [ %fewer, %leave ]
  %left = phi i64 [ %looks, %other ], [ %left.less, %again ], [ %looks, %leave ]
  %filled = load atomic i64, ptr %memory acquire, align 8
  %here = icmp sge i64 %filled, %round
  br i1 %here, label %come, label %wait
come:
  %following = add i64 %rank, 1
  br label %next
wait:
  %left.less = sub i64 %left, 1
  %spin = icmp sgt i64 %left.less, 0
  br i1 %spin, label %again, label %enough
again:
  {pause}
  br label %look
enough:
  %late = icmp sle i64 %yields.left, 0
  br i1 %late, label %missed, label %leave
leave:
  %yielded = call i32 @sched_yield()
  %fewer = sub i64 %yields.left, 1
  br label %look
met:
  ret i32 1
missed:
  ret i32 0
}}
"""


@functools.cache
def rounds_ir(arch: str) -> str:
    """The functions, for an architecture."""
    declared, pause = _PAUSE.get(arch, ("", ""))
    return declared + _COMMON + _MEET.format(MEET=MEET, LOOKS=R.LOOKS, YIELDS=YIELDS, pause=pause)
