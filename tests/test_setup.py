"""Setting up: what a machine without the right Python, platform or modules is told, in one sentence."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "prepare.py"


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """The set-up script as a module, with an environment folder of its own."""
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", str(tmp_path / "venv"))
    monkeypatch.setattr(module, "PYTHON", str(tmp_path / "venv" / "bin" / "python"))
    return module


def sentence(capsys, call) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    told = capsys.readouterr()
    assert stop.value.code == 1 and not told.out and told.err.count("\n") == 1 and told.err.startswith("treadle: ")
    return told.err


def test_an_old_python(prepare, monkeypatch, capsys):
    monkeypatch.setattr(prepare.sys, "version_info", (3, 8, 1))
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    assert "Python 3.10 or newer is needed" in sentence(capsys, prepare.use_a_newer_python)


def test_an_old_python_hands_over_to_a_newer_one(prepare, monkeypatch):
    started = []
    monkeypatch.setattr(prepare.sys, "version_info", (3, 8, 1))
    monkeypatch.setattr(prepare.shutil, "which", lambda name: "/opt/" + name if name == "python3.12" else None)
    monkeypatch.setattr(prepare.subprocess, "call", lambda *a, **k: 0)
    monkeypatch.setattr(prepare.os, "execv", lambda path, args: started.append(path) or sys.exit(0))
    with pytest.raises(SystemExit):
        prepare.use_a_newer_python()
    assert started == ["/opt/python3.12"]


@pytest.mark.parametrize("system, machine", [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "riscv64")])
def test_an_unsupported_platform(prepare, monkeypatch, capsys, system, machine):
    monkeypatch.setattr(prepare.sys, "platform", system)
    monkeypatch.setattr(prepare.platform, "machine", lambda: machine)
    told = sentence(capsys, prepare.check_platform)
    assert "64-bit Linux on x86-64 or aarch64" in told and machine in told


@pytest.mark.parametrize("libc", [("glibc", "2.17"), ("", "")])
def test_another_c_library(prepare, monkeypatch, capsys, libc):
    monkeypatch.setattr(prepare.platform, "libc_ver", lambda: libc)
    assert "glibc 2.28 or newer" in sentence(capsys, prepare.check_platform)


def test_a_python_without_venv(prepare, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "-venv` brings them" in sentence(capsys, prepare.make_environment)


def test_no_python_at_all(tmp_path):
    done = subprocess.run(["make", "-C", str(ROOT), "test", "PYTHON=no-such-python"], capture_output=True, text=True,
                          check=False)
    assert done.returncode and "treadle: no no-such-python on the path; install Python 3.10 or newer." in done.stderr


def test_an_index_out_of_reach(prepare, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "make_environment", lambda: None)
    monkeypatch.setattr(prepare.subprocess, "call", lambda *a, **k: 1)
    with pytest.raises(SystemExit):
        prepare.install(["core"])
    assert "the package index must be reachable" in capfd.readouterr().err


def test_nothing_is_installed_twice(prepare, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(prepare, "make_environment", lambda: (tmp_path / "venv").mkdir(exist_ok=True))
    monkeypatch.setattr(prepare, "link_for_the_type_checker", lambda: None)
    monkeypatch.setattr(prepare.subprocess, "call", lambda command, **k: calls.append(command[-1]) or 0)
    prepare.install(["core", "test"])
    prepare.install(["core", "test"])
    prepare.install(["core", "test", "demo"])
    alone = prepare.ALONE
    assert [c.partition("[")[2] or c for c in calls] == ["test]", *alone["test"], "demo]", *alone["demo"]]
