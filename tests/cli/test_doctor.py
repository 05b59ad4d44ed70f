"""`treadle doctor` says what works, and notices what does not."""

import json

from rich.console import Console
from typer.testing import CliRunner

from treadle import __version__
from treadle.frontend.cli import app, doctor
from treadle.schedules import runtime

run = CliRunner().invoke


def found(group):
    return {finding.topic: finding for finding in doctor.GROUPS_BY_NAME[group]()}


def test_it_names_the_versions_it_needs():
    findings = found("versions")
    assert findings["Treadle"].detail == __version__
    assert findings["apache-tvm"].state == doctor.WORKS
    assert findings["apache-tvm-ffi"].detail == "0.1.14.post1"


def test_a_package_outside_its_pin_is_broken(monkeypatch):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version",
                        lambda name: "9.9" if name == "apache-tvm-ffi" else real(name))
    finding = found("versions")["apache-tvm-ffi"]
    assert finding.state == doctor.BROKEN
    assert "0.1.14.post1" in finding.detail and "pip install" in finding.remedy


def test_it_names_targets_that_run_here():
    assert "cpu" in found("machine")["targets that run here"].detail


def test_a_cache_that_cannot_be_written_is_broken(monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("TREADLE_CACHE_DIR", str(in_the_way / "cache"))
    finding = found("cache")["kernel cache"]
    assert finding.state == doctor.BROKEN and "TREADLE_CACHE_DIR" in finding.remedy


def test_an_invalid_setting_is_reported_and_does_not_stop_the_rest(monkeypatch):
    monkeypatch.setenv("TREADLE_NUM_THREADS", "many")
    monkeypatch.setattr(runtime, "_requested", None)  # a number that a test in front of this one has set goes first
    monkeypatch.setattr(doctor, "GROUPS", tuple(g for g in doctor.GROUPS if g[0] in ("versions", "machine")))
    report = doctor.examine()
    assert report["machine"][0].state == doctor.BROKEN and "TREADLE_NUM_THREADS" in report["machine"][0].detail
    assert report["versions"][0].state == doctor.WORKS


def test_the_exit_code_follows_the_findings(monkeypatch):
    bad = (("group", lambda: iter([doctor.Finding("thing", doctor.BROKEN, "is not there", "fetch [it]")])),)
    monkeypatch.setattr(doctor, "GROUPS", bad)
    assert doctor.report(Console(quiet=True)) is False
    result = run(app, ["doctor"])
    assert result.exit_code == 1 and "fetch [it]" in result.output and "needs mending: thing" in result.output


def test_the_whole_report_as_json():
    result = run(app, ["doctor", "--json"])
    report = json.loads(result.output)
    assert result.exit_code == 0, report
    assert report["proof"][0]["state"] == "works"
