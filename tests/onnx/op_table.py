"""The tables of docs/onnx.md, made from the code: which ops there are rules for, and what does not pass.

    python tests/onnx/op_table.py        # writes them into docs/onnx.md
"""

from collections import defaultdict
from pathlib import Path

import onnx
from known_failures import KNOWN

import treadle as td  # noqa: F401 -- `td.onnx` must be importable
from treadle.frontend.onnx.functions import has_standard_body
from treadle.frontend.onnx.rules import all_rules

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "onnx.md"
OLDEST = 6


def supported():
    """domain -> op -> how: the opsets from which on there is a rule of its own, or that its body stands in."""
    found = defaultdict(dict)
    for rule in all_rules():
        found[rule.domain].setdefault(rule.op_type, []).append(rule.since)
    newest = {"": onnx.defs.onnx_opset_version()}
    for schema in onnx.defs.get_all_schemas():
        known = found[schema.domain]
        if schema.name not in known and not schema.deprecated and has_standard_body(
                schema.name, schema.domain, newest.get(schema.domain, schema.since_version)):
            known[schema.name] = "body"
    return found


def unsupported():
    """Ops of the standard domain that have neither."""
    have = supported()
    return sorted({s.name for s in onnx.defs.get_all_schemas()
                   if s.domain == "" and not s.deprecated and s.name not in have[""]})


def op_table():
    """One paragraph per domain: rules, and the bodies that stand in for the rest."""
    lines = []
    for domain, ops in sorted(supported().items()):
        rules = sorted(op for op, how in ops.items() if how != "body")
        bodies = sorted(op for op, how in ops.items() if how == "body")
        if not ops:
            continue
        listed = ": " + ", ".join(op + _versions(ops[op]) for op in rules) if rules else ""
        lines += [f"**`{domain or 'ai.onnx'}`**, {len(rules)} ops with a rule{listed}."]
        if bodies:
            lines += ["", f"By the body that the standard defines: {', '.join(bodies)}."]
        lines.append("")
    missing = unsupported()
    lines.append("Not supported in the standard domain: " + (", ".join(missing) or "none") + ".")
    return "\n".join(lines)


def _versions(since):
    """Further versions of an op whose meaning changed: a rule of its own for each."""
    later = [str(v) for v in since if v > OLDEST]
    return f" ({', '.join(later)})" if later and len(since) > 1 else ""


def failure_table():
    """Ops and reasons, a row for each reason."""
    by_reason = defaultdict(list)
    for name, reason in KNOWN.items():
        by_reason[reason].append(name.removeprefix("test_"))
    lines = ["| cases | why |", "| --- | --- |"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join(lines)


TABLES = {"ops": op_table, "failures": failure_table}


def filled(text):
    """The page with its tables made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name}: made by tests/onnx/op_table.py -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(start)
        text = head + start + make() + "\n" + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
