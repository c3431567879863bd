"""show_config: the report is complete, honest about what is missing, and warns where it should."""
import copy
import json
import types

import pytest
import torch
from small_tree import ROOT, python

from landscape_fast import _extension, config, show_config
from landscape_fast.ops import _dispatch


@pytest.fixture(scope="module")
def report():
    return config.config_report()


def test_every_op_has_a_backend_and_a_reason(report):
    assert {row["op"] for row in report["ops"]} == set(_dispatch.OPS)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for row in report["ops"]:
        assert row["backend"] in _dispatch.NAMES and row["reason"]
        assert row["device"] in devices
        dtype = getattr(torch, row["dtype"])
        assert row["backend"] == _dispatch.explain(row["op"], row["device"], dtype)[0]


def test_text_and_json_say_the_same(report, capsys):
    show_config(as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == report.keys() and printed["ops"] == report["ops"]
    show_config()
    text = capsys.readouterr().out
    assert torch.__version__ in text and all(row["reason"] in text for row in report["ops"])
    assert all(f"WARNING: {warning}" in text for warning in report["warnings"])


def test_module_is_the_command():
    done = python("-m", "landscape_fast", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("landscape_fast ")


def test_a_backend_that_cannot_run_is_shown_not_raised(monkeypatch):
    monkeypatch.setattr(_dispatch, "FORCED", "cuda")
    monkeypatch.setitem(_dispatch.OPS, "imaginary", {"cuda": (torch.float32,)})
    rows = [row for row in config.config_report()["ops"] if row["op"] == "imaginary"]
    float32 = next(row for row in rows if row["device"] == "cpu" and row["dtype"] == "float32")
    assert float32["backend"] == "error" and "cannot run here" in float32["reason"]


def test_a_missing_extension_is_the_first_warning(monkeypatch):
    monkeypatch.setattr(_extension, "C", None)
    monkeypatch.setattr(_extension, "error", "no compiler was there")
    monkeypatch.setattr(_extension, "with_cuda", False)
    report = config.config_report()
    assert report["extension"]["loaded"] is None
    assert report["warnings"][0] == "no compiler was there"
    assert "not loaded" in config.as_text(report)


def test_a_stale_extension_is_told(monkeypatch):
    info = {"sources": "0123456789abcdef", "archs": [], "isa": ["baseline"], "nvcc": None}
    fake = types.SimpleNamespace(
        __file__=str(ROOT / "landscape_fast" / "_C.so"),
        build_info=json.dumps(info),
        cpu_isa=lambda: "baseline",
    )
    monkeypatch.setattr(_extension, "C", fake)
    monkeypatch.setattr(_extension, "with_cuda", False)
    assert any("csrc/ has changed" in warning for warning in config.config_report()["warnings"])


def with_gpu(report: dict) -> dict:
    """A healthy report of a machine with an H100, to break one thing at a time in."""
    report = copy.deepcopy(report)
    report["gpus"] = [{"name": "H100", "capability": "9.0", "memory_gib": 80.0}]
    report["extension"] = {
        "loaded": "_C.so", "error": None, "stale": False, "isa": "avx2",
        "build": {"archs": ["sm_80", "compute_80", "sm_90a", "sm_100"], "nvcc": "13.0"},
    }  # fmt: skip
    report["cuda"] = {"torch": "13.0", "extension": "13.0", "driver_supports": "13.0",
                      "driver": "580.65.06"}  # fmt: skip
    report["openmp"] = ["/lib/libgomp.so.1"]
    report["triton"] = {"version": "3.7.1", "interpreted": False, "c_compiler": "/usr/bin/gcc"}
    return report


def test_warnings_on_a_gpu_machine(report):
    healthy = with_gpu(report)
    assert config._warnings(healthy) == []
    config.as_text(healthy)

    broken = with_gpu(report)
    broken["cuda"]["driver_supports"] = "12.4"
    assert "built with CUDA 13.0, the driver supports 12.4" in config._warnings(broken)[0]

    broken = with_gpu(report)
    broken["extension"]["build"]["archs"] = ["sm_80"]
    assert "TORCH_CUDA_ARCH_LIST=9.0" in config._warnings(broken)[0]

    broken = with_gpu(report)
    broken["openmp"].append("/lib/libiomp5.so")
    assert "2 OpenMP runtimes" in config._warnings(broken)[0]

    broken = with_gpu(report)
    broken["triton"]["c_compiler"] = None
    assert "C compiler" in config._warnings(broken)[0]


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        ("sm_80", "8.0", True),
        ("sm_80", "8.6", True),  # same major, later minor
        ("sm_86", "8.0", False),
        ("sm_90a", "9.0", True),
        ("sm_90a", "10.0", False),
        ("sm_80 compute_80", "12.0", True),  # compiled by the driver
        ("sm_90a compute_90a", "10.0", False),
        ("sm_100", "8.0", False),
    ],
)
def test_code_for_a_gpu(archs, capability, runs):
    assert config._has_code_for(archs.split(), capability) is runs


def test_openmp_is_the_one_of_torch():
    """Whoever loads first decides; a second runtime would compete with it for the cores."""
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch has no OpenMP")
    found = []
    for first in ("import torch", "from landscape_fast import _extension"):
        code = f"{first}; from landscape_fast import config; print(config.openmp_runtimes())"
        done = python("-c", code, cwd=ROOT)
        found.append(json.loads(done.stdout.replace("'", '"')))
    assert found[0] == found[1] and len(found[0]) == 1


def test_version_numbers():
    assert config._dotted(13000) == "13.0" and config._dotted(12080) == "12.8"
    assert config._dotted(0) is None
