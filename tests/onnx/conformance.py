"""The backend suite of the `onnx` package, run on compiled programs: a table of pass rates per op.

    python tests/onnx/conformance.py                      # everything
    python tests/onnx/conformance.py node -k Resize -v    # cases whose name or op matches, with the errors
    python tests/onnx/conformance.py node --part 0/2      # every second case: two of these run side by side

A case belongs to the class that has to pass if all its inputs and outputs are floats (f64, f32, f16, bf16), integers or
bools; the others (strings, complex numbers, 8-bit floats, 4-bit integers...) are counted apart.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

import treadle as td

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
NUMBERS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.BOOL,
           TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8,
           TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64}


@dataclass
class Case:
    """One test case.

    Attributes:
        kind: of the suite: "node", "simple"...
        op: the op that it is about.
        numbers: whether it belongs to the class that has to pass.
    """

    name: str
    kind: str
    op: str
    numbers: bool
    case: Any

    @property
    def model(self) -> onnx.ModelProto:
        """Its model."""
        return self.case.model or onnx.load(os.path.join(self.case.model_dir, "model.onnx"))

    def data(self) -> Iterator[tuple[list[Any], list[Any]]]:
        """Pairs of inputs and expected outputs."""
        if self.case.model_dir is None:
            for inputs, outputs in self.case.data_sets:
                yield [_array(x) for x in inputs], [_array(x) for x in outputs]
            return
        model = self.model
        for folder in sorted(glob.glob(os.path.join(self.case.model_dir, "test_data_set*"))):
            yield (_load(folder, "input", model.graph.input), _load(folder, "output", model.graph.output))


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _load(folder: str, what: str, values: Any) -> list[Any]:
    found = []
    for i in range(len(glob.glob(os.path.join(folder, f"{what}_*.pb")))):
        data = Path(folder, f"{what}_{i}.pb").read_bytes()
        kind = values[i].type
        if kind.HasField("sequence_type"):
            found.append(numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
        elif kind.HasField("optional_type"):
            found.append(numpy_helper.to_optional(onnx.OptionalProto.FromString(data)))
        else:
            found.append(numpy_helper.to_array(onnx.TensorProto.FromString(data)))
    return found


def _is_number(kind: onnx.TypeProto) -> bool:
    if kind.HasField("tensor_type"):
        return kind.tensor_type.elem_type in NUMBERS
    if kind.HasField("sequence_type"):
        return _is_number(kind.sequence_type.elem_type)
    return kind.HasField("optional_type") and _is_number(kind.optional_type.elem_type)


def cases(kinds: Any = KINDS) -> list[Case]:
    """The cases of the suite, by name."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite computes some expected values with overflows
        for kind in kinds:
            for case in load_model_tests(kind=kind):
                if case.url is not None and case.model_dir is None:
                    continue
                model = case.model or onnx.load(os.path.join(case.model_dir, "model.onnx"))
                graph = model.graph
                numbers = all(_is_number(v.type) for v in [*graph.input, *graph.output])
                op = _subject(case.name, [n.op_type for n in graph.node])
                found.append(Case(case.name, kind, op, numbers, case))
    return sorted(found, key=lambda c: (c.kind, c.op, c.name))


def _subject(name: str, ops: list[str]) -> str:
    flat = name.removeprefix("test_").replace("_", "").lower()
    return max((op for op in ops if flat.startswith(op.lower())), key=len, default=ops[0] if ops else "-")


def run(case: Case) -> None:
    """Runs a case compiled.

    Raises:
        AssertionError: the outputs differ.
        TreadleError: it could not be run.
    """
    prepared = td.onnx.backend.prepare(case.model)
    for inputs, expected in case.data():
        outputs = list(prepared.run(list(inputs)))
        assert len(outputs) == len(expected), f"{len(outputs)} outputs where {len(expected)} are expected"
        for output, wanted in zip(outputs, expected):
            compare(output, wanted, case.case.rtol, case.case.atol)


def compare(output: Any, wanted: Any, rtol: float, atol: float) -> None:
    """Compares by the suite's own rule, element by element where there are several."""
    if wanted is None or output is None:
        assert wanted is output, f"{output} where {wanted} is expected"
    elif isinstance(wanted, (list, tuple)):
        assert isinstance(output, list) and len(output) == len(wanted), f"{output} where {wanted} is expected"
        for one, other in zip(output, wanted):
            compare(one, other, rtol, atol)
    else:
        Runner.assert_similar_outputs([np.asarray(wanted)], [output], rtol=rtol, atol=atol)


def attempt(case: Case) -> str:
    """An empty text, or why the case fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(case)
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}"
    return ""


def attempt_all(batch: list[Case]) -> list[str]:
    """`attempt` for several cases, compiled as one program; those that do not pass so are run alone.

    One program of many models costs a fraction of as many programs: kernels are compiled side by side, and linked once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passed = _passing(batch)
    return ["" if case.name in passed else attempt(case) for case in batch]


def _passing(batch: list[Case]) -> set[str]:
    """The names of the cases that pass when they are compiled together."""
    runs: list[tuple[Case, Any, list[Any], list[Any]]] = []
    for case in batch:
        try:
            data = list(case.data())
            compiled = td.onnx.backend.prepare(case.model).compiled
            if len(data) == 1 and not compiled.fn.text:
                given = [compiled._fix(n, v) for n, v in zip(compiled.fn.input_names, data[0][0])]
                runs.append((case, compiled.fn, given, data[0][1]))
        except Exception:
            continue  # it will say so alone

    def together(inputs: list[Any]) -> dict[str, Any]:
        results = {}
        for (case, module, _, _), given in zip(runs, inputs):
            try:
                outputs = module(*given)
                results[case.name] = outputs if isinstance(outputs, tuple) else (outputs,)
            except td.TreadleError:
                pass  # what it left in the trace is dead
        return results

    try:
        results = td.compile(together)([given for _, _, given, _ in runs])
    except Exception:
        return set()
    return {case.name for case, _, _, expected in runs
            if case.name in results and _equal(results[case.name], expected, case.case)}


def _equal(results: Any, expected: list[Any], case: Any) -> bool:
    try:
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected):
            compare(td.onnx.backend.to_array(result), wanted, case.rtol, case.atol)
    except (AssertionError, TypeError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("-k", default="", help="part of a name or op")
    parser.add_argument("-v", action="store_true", help="print why cases fail")
    parser.add_argument("--part", default="0/1", help="i/n: every nth case from the ith on")
    parser.add_argument("--batch", type=int, default=16, help="cases that are compiled together")
    parser.add_argument("--slow", type=float, default=0, help="print cases that take longer than this many seconds")
    parser.add_argument("--all", action="store_true", help="run the cases outside the class too")
    options = parser.parse_args()
    wanted = [c for c in cases(options.kinds) if options.k.lower() in f"{c.name} {c.op}".lower()]
    part, parts = map(int, options.part.split("/"))
    wanted = wanted[part::parts]
    if not options.all:
        wanted = [c for c in wanted if c.numbers or c.kind != "node"]
    table: dict[tuple[str, str], list[tuple[Case, str]]] = defaultdict(list)
    started = time.perf_counter()
    for start in range(0, len(wanted), options.batch):
        batch = wanted[start:start + options.batch]
        before = time.perf_counter()
        problems = attempt_all(batch) if options.batch > 1 else [attempt(batch[0])]
        took = time.perf_counter() - before
        for case, problem in zip(batch, problems):
            table[case.kind, case.op].append((case, problem))
            if problem and options.v:
                print(f"FAIL {case.name}: {problem[:300]}", flush=True)
        if options.slow and took > options.slow:
            print(f"SLOW {batch[0].name}...: {took:.1f} s", flush=True)
    report(table, time.perf_counter() - started)


def report(table: dict[tuple[str, str], list[tuple[Case, str]]], seconds: float) -> None:
    """Prints ops with failures, then the totals."""
    for (kind, op), rows in sorted(table.items()):
        failed = [c.name for c, problem in rows if problem]
        if failed:
            print(f"{kind:18} {op:28} {len(rows) - len(failed):3}/{len(rows):<3} {' '.join(failed[:6])[:150]}")
    for kind in sorted({k for k, _ in table}):
        for numbers in (True, False):
            rows = [r for (k, _), rs in table.items() if k == kind for r in rs if r[0].numbers == numbers]
            if rows:
                passed = sum(not problem for _, problem in rows)
                what = "numbers" if numbers else "others"
                print(f"{kind:18} {what:8} {passed:4} of {len(rows):4} pass, {100 * passed / len(rows):.2f} %")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
