"""The memory plan: no two live temps overlap, and the arena is as small as it can be."""

from hypothesis import given
from hypothesis import strategies as st
from program_kernels import buffer, chain

from treadle.schedules.abi import ALIGNMENT, aligned
from treadle.schedules.plan import plan_memory
from treadle.schedules.program import (
    Branch,
    Buffer,
    Copy,
    KernelCall,
    Loop,
    LoopVar,
    Program,
    While,
    accesses,
    children,
    element,
)

KERNEL = object()


def run(*args: Buffer) -> KernelCall:
    """A kernel that reads all arguments but the last, which it writes."""
    return KernelCall(KERNEL, args, [len(args) - 1])


def temp(name: str, nbytes: int = 64) -> Buffer:
    return Buffer(name, (nbytes,), "uint8")


def overlapping(plan, a: Buffer, b: Buffer) -> bool:
    start, other = plan.offset(a), plan.offset(b)
    return start < other + b.nbytes and other < start + a.nbytes


def test_a_chain_needs_two_places():
    plan = plan_memory(chain(20, shape=(1000,)))
    assert plan.arena_bytes == plan.lower_bound == 2 * aligned(4000)


def test_offsets_are_aligned_and_sizes_reported():
    x, y, a, b = temp("x", 10), temp("y", 70), temp("a", 1), temp("b", 65)
    x.kind, y.kind = "input", "output"
    plan = plan_memory(Program([x], [y], [run(x, a), run(a, b), run(a, b, y)]))
    assert {plan.offset(a) % ALIGNMENT, plan.offset(b) % ALIGNMENT} == {0}
    assert not overlapping(plan, a, b)
    assert plan.peak_bytes == plan.arena_bytes + 80 and plan.arena_bytes == 64 + 128


def test_small_temps_fill_the_gap_of_a_dead_large_one():
    x, y = buffer("x", "input"), buffer("y", "output")
    big, s1, s2, s3 = temp("big", 6400), temp("s1", 640), temp("s2", 640), temp("s3", 640)
    steps = [run(x, big), run(big, s1), run(s1, s2), run(s1, s2, s3), run(s3, y)]
    plan = plan_memory(Program([x], [y], steps))
    assert plan.arena_bytes == plan.lower_bound == 7040


def loop_program(body_of):
    x, y, i = buffer("x", "input"), buffer("y", "output"), LoopVar("i")
    return x, y, i, lambda before, body, after: Program([x], [y], [*before, Loop(i, 4, body), *after])


def test_temps_of_one_iteration_share_with_each_other_and_with_what_follows():
    x, y, _, program = loop_program(None)
    a, b, c = temp("a"), temp("b"), temp("c")
    plan = plan_memory(program([], [run(x, a), run(a, b), run(b, c), run(c, y)], []))
    assert plan.arena_bytes == 128


def test_a_carry_is_live_throughout_its_loop():
    """carry is read first and written last: what the body uses in between must not touch it."""
    x, y, _, program = loop_program(None)
    carry, a, b, c = temp("carry"), temp("a"), temp("b"), temp("c")
    body = [run(carry, a), run(a, b), run(b, c), run(c, carry)]
    plan = plan_memory(program([run(x, carry)], body, [run(carry, y)]))
    assert not any(overlapping(plan, carry, other) for other in (a, b, c))


def test_what_a_loop_reads_survives_every_iteration():
    x, y, _, program = loop_program(None)
    weight, a, b = temp("weight"), temp("a"), temp("b")
    plan = plan_memory(program([run(x, weight)], [run(weight, a), run(a, b), run(b, y)], []))
    assert not overlapping(plan, weight, b)


def test_a_stack_filled_element_by_element_keeps_its_elements():
    x, y, i, program = loop_program(None)
    stack, a, b = temp("stack", 256), temp("a"), temp("b")
    stack.shape = (4, 64)
    body = [run(x, a), run(a, b), Copy(b, element(stack, i))]
    plan = plan_memory(program([], body, [run(stack, y)]))
    assert not overlapping(plan, stack, a) and not overlapping(plan, stack, b)


def test_a_conditional_definition_does_not_end_a_life():
    x, y, _, program = loop_program(None)
    kept, a, pred = temp("kept"), temp("a"), Buffer("pred", (), "bool", "input")
    body = [run(x, a), Branch(pred, [run(a, kept)]), run(kept, a, y)]
    plan = plan_memory(program([run(x, kept)], body, []))
    assert not overlapping(plan, kept, a)


def test_inner_temps_of_nested_loops_are_still_reused():
    x, y, i, program = loop_program(None)
    j, a, b, c = LoopVar("j"), temp("a"), temp("b"), temp("c")
    plan = plan_memory(program([], [Loop(j, 3, [run(x, a), run(a, b)]), run(x, c), run(c, y)], []))
    assert plan.arena_bytes == 128


def test_branch_arms_share():
    x, y, pred = buffer("x", "input"), buffer("y", "output"), Buffer("pred", (), "bool", "input")
    a, b = temp("a"), temp("b")
    plan = plan_memory(Program([pred, x], [y], [Branch(pred, [run(x, a), run(a, y)], [run(x, b), run(b, y)])]))
    assert plan.arena_bytes == 64


def test_the_plan_is_deterministic():
    first, second = plan_memory(chain(9)), plan_memory(chain(9))
    assert sorted(first.offsets.values()) == sorted(second.offsets.values())


# -- the property: execution with every byte tagged by its writer ---------------------------------------------


@st.composite
def programs(draw) -> Program:
    """Random programs of nested loops, whiles and branches that read only what is surely written."""
    sizes = st.integers(1, 300)
    count = iter(range(1000))
    x, y, pred = temp("x"), temp("y"), Buffer("p", (), "bool", "input")
    x.kind, y.kind = "input", "output"

    def block(depth: int, written: list[Buffer]) -> list:
        steps, written = [], list(written)
        for _ in range(draw(st.integers(1, 5))):
            kinds = ["kernel"] * 4 + ["rewrite"] + ["loop", "while", "branch"] * (depth < 3)
            kind = draw(st.sampled_from(kinds))
            sources = draw(st.lists(st.sampled_from(written), min_size=1, max_size=3, unique_by=id))
            if kind == "kernel":
                target = temp(f"t{next(count)}", draw(sizes))
                steps.append(run(*sources, target))
                written.append(target)
            elif kind == "rewrite":
                temps = [b for b in written if b.kind == "temp" and b not in sources]
                if temps:
                    steps.append(run(*sources, draw(st.sampled_from(temps))))
            elif kind == "loop":
                steps.append(Loop(LoopVar("i"), draw(st.integers(1, 3)), block(depth + 1, written)))
            elif kind == "while":
                flag = temp(f"flag{next(count)}", 1)
                steps.append(While(LoopVar("k"), [run(*sources, flag)], flag, block(depth + 1, written)))
            else:
                steps.append(Branch(pred, block(depth + 1, written), block(depth + 1, written)))
        return steps

    steps = block(0, [x])
    return Program([pred, x], [y], [*steps, run(x, y)])


def execute(program: Program, plan, choices) -> None:
    """Run with memory that remembers who wrote each byte last: a temp must find its own bytes when it is read."""
    memory: dict[int, Buffer] = {}

    def touch(step):
        for target, mode in accesses(step):
            if target.kind != "temp":
                continue
            start = plan.offset(target)
            if "r" in mode:
                kept = all(memory[k] is target for k in range(start, start + target.nbytes))
                assert kept, f"{target} was overwritten"
            else:
                memory.update((k, target) for k in range(start, start + target.nbytes))

    def visit(steps):
        for step in steps:
            if isinstance(step, Loop):
                for _ in range(step.extent):
                    visit(step.body)
            elif isinstance(step, While):
                for _ in range(next(choices) % 3):
                    visit(step.condition)
                    touch(step)
                    visit(step.body)
                visit(step.condition)
                touch(step)
            elif isinstance(step, Branch):
                visit(children(step)[next(choices) % 2])
            else:
                touch(step)

    visit(program.steps)


@given(programs(), st.lists(st.integers(0, 5), min_size=20, max_size=20))
def test_no_temp_is_overwritten_while_it_is_live(program, choices):
    plan = plan_memory(program)
    endless = (choices[i % len(choices)] for i in range(1 << 30))
    execute(program, plan, endless)
    assert plan.lower_bound <= plan.arena_bytes <= sum(aligned(i.buffer.nbytes) for i in plan.intervals)
    for i, a in enumerate(plan.intervals):
        for b in plan.intervals[:i]:
            assert not (a.meets(b) and overlapping(plan, a.buffer, b.buffer))
