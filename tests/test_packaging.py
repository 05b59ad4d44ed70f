"""The wheel that a user installs: it holds the whole package and nothing else, and imports in a clean environment."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("ir", "autodiff", "schedules", "distributed", "frontend")
NOT_SHIPPED = ("tests", "tutorials", "benchmarks", "docs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that setuptools leaves nothing behind in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "treadle"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")
    shutil.copytree(ROOT, copy, ignore=left_out)
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
        "--wheel-dir", str(target), str(copy))
    built = list(target.glob("treadle-*.whl"))
    assert len(built) == 1
    return built[0]


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_test(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    modules = {"treadle/" + path.relative_to(ROOT).as_posix()
               for path in [*ROOT.glob("*.py"), *(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))]}
    missing = sorted(modules - shipped)
    assert not missing, f"not in the wheel; is their package listed in pyproject.toml? {missing}"
    assert "treadle/py.typed" in shipped
    assert not [name for name in shipped if name.split("/")[1] in NOT_SHIPPED or name.split("/")[0] != "treadle"]


@pytest.mark.slow
def test_the_wheel_imports_in_a_clean_environment(wheel, tmp_path):
    """The dependencies are lent by this environment through one line of a .pth file, so nothing is downloaded; that
    way of lending does not run this environment's own .pth files, so its editable install cannot answer instead."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    told = run(python, "-c", "import treadle; print(treadle.__file__); print(treadle.__version__)", cwd=tmp_path)
    where, version = told.split()
    assert Path(where).is_relative_to(site)
    assert f"treadle-{version}-" in wheel.name
    script = run(str(tmp_path / "venv" / "bin" / "treadle"), "--version", cwd=tmp_path)
    assert version in script


def test_the_notice_names_what_is_not_our_own():
    """The word pieces are those of BERT, byte for byte; the notice goes with the wheel."""
    notice = (ROOT / "NOTICE").read_text()
    pieces = "frontend/cli/demo/wordpieces.txt"
    assert pieces in notice and hashlib.sha256((ROOT / pieces).read_bytes()).hexdigest() in notice
    assert 'license-files = ["LICENSE", "NOTICE"]' in (ROOT / "pyproject.toml").read_text()
