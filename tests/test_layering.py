"""The architecture, held by a walk over every file's syntax tree: who may import whom, and how long a thing may be.

The rules are those of docs/architecture.md. Nothing of the package is imported here, so that a broken layer is
named as such and not as the import error it causes.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("ir", "autodiff", "schedules", "distributed", "frontend")
# Each layer and those it may import. The frontend joins them all, so it is not listed.
ALLOWED = {
    "ir": {"ir"},
    "autodiff": {"autodiff", "ir"},
    "schedules": {"schedules", "ir"},
    "distributed": {"distributed", "ir"},
}
# A library that only one folder may import, wherever in a file the import stands.
HOMES = {"tvm": "schedules", "tvm_ffi": "schedules", "onnx": "frontend/onnx", "mpi4py": "distributed"}
FILE_LINES, FUNCTION_LINES = 500, 60
# Tables of data may be longer; each is named here with what it holds.
TABLES: dict[str, str] = {}


@functools.cache
def sources() -> dict[str, tuple[str, ast.Module]]:
    """Path relative to the root -> (text, tree), for every file of the package."""
    paths = [*ROOT.glob("*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): (text := path.read_text(), ast.parse(text, str(path)))
            for path in sorted(paths)}


def packages_of(name: str) -> list[str]:
    return name.split("/")[:-1]


def relative_targets(name: str, node: ast.ImportFrom) -> Iterator[list[str]]:
    """What a relative import names, as paths of parts below the root."""
    base = packages_of(name)
    up = node.level - 1
    assert up <= len(base), f"{name}:{node.lineno}: relative import reaches above the package"
    target = base[: len(base) - up] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        yield [*target, alias.name]


def absolute_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node.lineno


def expect_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_the_walk_sees_the_package():
    assert "__init__.py" in sources() and any(name.startswith("ir/") for name in sources())


def test_layers_import_downwards_only():
    problems = []
    for name, (_, tree) in sources().items():
        allowed = ALLOWED.get(name.split("/")[0])
        if allowed is None:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                for target in relative_targets(name, node):
                    if target[0] not in allowed:
                        problems.append(f"{name}:{node.lineno}: imports {'.'.join(target)}, which is above its layer")
    expect_none(problems)


def test_inside_the_package_imports_are_relative():
    inner = {"treadle", *LAYERS}
    expect_none([f"{name}:{line}: imports {module} absolutely"
                 for name, (_, tree) in sources().items()
                 for module, line in absolute_names(tree) if module.split(".")[0] in inner])


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_only(library):
    home = HOMES[library]
    expect_none([f"{name}:{line}: imports {module}, whose home is {home}/"
            for name, (_, tree) in sources().items() if not name.startswith(home)
            for module, line in absolute_names(tree) if module.split(".")[0] == library])


def module_level_imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Files of the package that importing this one imports too."""
    files = sources()
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            pending.extend(child for child in ast.walk(node) if isinstance(child, ast.ImportFrom))
        elif isinstance(node, ast.ImportFrom) and node.level:
            for target in relative_targets(name, node):
                for path in ("/".join(target) + ".py", "/".join(target[:-1]) + ".py",
                             "/".join(target) + "/__init__.py", "/".join([*target[:-1], "__init__.py"])):
                    if path.lstrip("/") in files and path.lstrip("/") != name:
                        yield path.lstrip("/")
                        break


def test_no_file_is_imported_in_a_circle():
    edges = {name: set(module_level_imports(name, tree)) for name, (_, tree) in sources().items()}
    # A package's __init__ that gathers its own modules is no circle unless one of them asks the package itself.
    done: set[str] = set()
    circles: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circles.append(" -> ".join([*path[path.index(name):], name]))
            return
        if name in done:
            return
        for other in sorted(edges.get(name, ())):
            visit(other, (*path, name))
        done.add(name)

    for name in sorted(edges):
        visit(name, ())
    expect_none(circles)


def test_files_and_functions_keep_to_their_budgets():
    problems = []
    for name, (text, tree) in sources().items():
        lines = text.count("\n") + 1
        if lines >= FILE_LINES and name not in TABLES:
            problems.append(f"{name}: {lines} lines; the budget is under {FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= FUNCTION_LINES:
                    problems.append(f"{name}:{node.lineno}: {node.name} has {length} lines; "
                                    f"the budget is under {FUNCTION_LINES}")
    expect_none(problems)


def test_every_exception_to_the_budget_is_still_needed():
    expect_none([f"{name}: excepted ({why}) and missing or short by now" for name, why in TABLES.items()
            if name not in sources() or sources()[name][0].count("\n") + 1 < FILE_LINES])


def test_every_module_says_what_it_is_for():
    silent = [name for name, (_, tree) in sources().items() if not ast.get_docstring(tree)]
    expect_none([f"{name}: no module docstring" for name in silent])


def test_no_exception_is_swallowed_whole():
    expect_none([f"{name}:{node.lineno}: swallows every exception"
            for name, (_, tree) in sources().items() for node in ast.walk(tree)
            if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))])
