"""docs/onnx.md says what the code says."""

import op_table


def test_the_tables_are_those_of_the_code():
    text = op_table.PAGE.read_text()
    assert op_table.filled(text) == text, "run: python tests/onnx/op_table.py"


def test_nearly_all_standard_ops_are_there():
    assert len(op_table.unsupported()) <= 2
