"""Targets: parsing, detection of the host, what LLVM is told."""

import pytest

from treadle.ir.errors import TargetError
from treadle.schedules import runtime
from treadle.schedules import target as module
from treadle.schedules.target import ISAS, Target, host_caches, host_features


def test_host_target_has_what_the_host_has():
    target = Target.parse("cpu")
    assert target.runnable_here() and target.missing_here == []
    assert target.features <= host_features()
    assert target.threads == runtime.get_num_threads() >= 1
    assert Target.parse(target) is target and str(target) == "cpu"


@pytest.mark.parametrize("isa", ISAS)
def test_named_instruction_sets_parse_and_round_trip(isa):
    target = Target.parse(f"cpu:{isa}")
    assert Target.parse(str(target)) == target
    assert target.vector_bits == ISAS[isa].vector_bits
    assert target.tvm_target.kind.name == "llvm"
    assert all(target.has(feature) for feature in ISAS[isa].features)
    assert target.runnable_here() == (not target.missing_here)


def test_feature_names_ignore_separators():
    target = Target.parse("cpu:avx512_bf16")
    assert target.has("avx512_bf16") and target.has("AVX512BF16") and not target.has("amx_bf16")


@pytest.mark.parametrize("spec", ["gpu", "cpu:avx9000", "", "cuda", "cuda:gtx", "cpu:"])
def test_unknown_targets_list_the_choices(spec):
    with pytest.raises(TargetError, match="cpu:avx512_bf16"):
        Target.parse(spec)


def test_cuda_parses_but_says_that_it_does_not_compile():
    target = Target.parse("cuda:sm_80")
    assert (target.kind, target.arch, target.runnable_here()) == ("cuda", "sm_80", False)
    with pytest.raises(TargetError, match="CPUs only"):
        _ = target.tvm_target


def test_fingerprints_differ_by_instruction_set_and_not_by_threads(monkeypatch):
    prints = {Target.parse(f"cpu:{isa}").fingerprint for isa in ISAS}
    assert len(prints) == len(ISAS)
    before = Target.parse("cpu")
    monkeypatch.setattr(runtime, "_requested", 7)
    after = Target.parse("cpu")
    assert after.threads == 7 and after.fingerprint == before.fingerprint


def test_a_feature_hidden_by_the_hypervisor_is_switched_off(monkeypatch):
    """LLVM knows the CPU by name and would use all that such CPUs have."""
    if Target.parse("cpu").arch != "x86_64":
        pytest.skip("features are listed for x86 only")
    hidden = host_features() - {"avx512f", "avx512vl", "avx512bf16"}
    monkeypatch.setattr(module, "host_features", lambda: hidden)
    target = Target.parse("cpu")
    assert "-avx512f" in target.llvm["mattr"] and not target.has("avx512f") and target.vector_bits <= 256


def test_hybrid_cpuinfo_gives_what_all_cores_have(monkeypatch, tmp_path):
    text = "processor : 0\nflags : sse avx2 avx512f\n\nprocessor : 1\nflags : sse avx2\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / "cpuinfo")
    assert module.host_features.__wrapped__() == {"sse", "avx2"}


def test_caches_have_sane_sizes(monkeypatch):
    sizes = host_caches()
    assert 8 << 10 <= sizes[1] < sizes[2] <= sizes[3]
    monkeypatch.setattr(module, "Path", lambda name: __import__("pathlib").Path("/nonexistent"))
    assert module.host_caches.__wrapped__() == {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
