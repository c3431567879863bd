"""What this installation consists of and what it would run: versions, devices, build, backends."""
import importlib
import json
import os
import pkgutil
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import landscape_fast
from landscape_fast import _extension, ops
from landscape_fast._sources import source_hash
from landscape_fast.ops import _dispatch

SWITCHES = {
    "LANDSCAPE_FAST_BACKEND": "torch, cpp, triton or cuda: force one backend where an op has it",
    "LANDSCAPE_FAST_AUTOTUNE": "1: search kernel configurations instead of taking the shipped ones",
    "LANDSCAPE_FAST_DEBUG": "1: check values (labels, finiteness) as well as shapes",
    "LANDSCAPE_FAST_ISA": "baseline, avx2 or avx512: the CPU kernels' instruction set, at most",
    "TRITON_INTERPRET": "1: Triton kernels are interpreted on the CPU (tests)",
}
OPENMP = re.compile(r"(libgomp|libiomp\d*|libomp)[^/]*\.(so|dylib)")


def show_config(as_json: bool = False) -> None:
    """Prints `config_report()`, as text or as one JSON object."""
    report = config_report()
    print(json.dumps(report, indent=2) if as_json else as_text(report))


def config_report() -> dict:
    """Everything `show_config` prints, as plain data.

    Returns:
        A dict with the sections package, torch, gpus, triton, extension, cuda (versions side by
        side), openmp (runtimes in this process), environment, ops (one entry per op, device and
        dtype, with the backend that would run and the reason), warnings.
    """
    report = {
        "package": _package(),
        "torch": _torch(),
        "gpus": _gpus(),
        "triton": _triton(),
        "extension": _compiled(),
        "cuda": _cuda(),
        "openmp": openmp_runtimes(),
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "ops": _ops(),
    }
    report["warnings"] = _warnings(report)
    return report


def _package() -> dict:
    return {
        "version": landscape_fast.__version__,
        "path": str(Path(landscape_fast.__file__).parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }


def _torch() -> dict:
    cudnn = torch.backends.cudnn
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if torch.version.cuda and cudnn.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_gib": round(about.total_memory / 2**30, 1),
            }
        )
    return gpus


def _triton() -> dict:
    try:
        found = version("triton")
    except PackageNotFoundError:
        found = None
    compilers = (os.environ.get("CC"), *map(shutil.which, ("gcc", "clang", "cc")))
    compiler = next(filter(None, compilers), None)
    return {"version": found, "interpreted": _dispatch.INTERPRETED, "c_compiler": compiler}


def _compiled() -> dict:
    module = _extension.C
    if module is None:
        return {"loaded": None, "error": _extension.error, "build": None, "stale": False}
    build = json.loads(module.build_info)
    csrc = Path(landscape_fast.__file__).resolve().parent.parent / "csrc"
    checkout = landscape_fast._in_checkout
    note = Path(module.__file__).parent / "_build_failure.txt"
    return {
        "loaded": module.__file__,
        "error": note.read_text().strip() if note.is_file() else None,  # its CUDA part failed
        "build": build,
        "stale": checkout and build.get("sources") != source_hash(csrc),
        "isa": module.cpu_isa(),
    }


def _cuda() -> dict:
    """The CUDA versions that have to get along."""
    runtime = driver = None
    if _extension.with_cuda:
        runtime = _dotted(_extension.C.cuda_runtime_version())
        driver = _dotted(_extension.C.cuda_driver_version())
    kernel_module = None
    proc = Path("/proc/driver/nvidia/version")
    if proc.is_file():
        found = re.search(r"Kernel Module\D*?(?:for \S+\s+)?(\d+[\d.]+)", proc.read_text())
        kernel_module = found[1] if found else None
    return {
        "torch": torch.version.cuda,
        "extension": runtime,
        "driver_supports": driver,
        "driver": kernel_module,
    }


def _dotted(number: int) -> str | None:
    """13000 -> "13.0"; 0, which the runtime gives without a driver -> None."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; [] where /proc does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    lines = [line for line in maps.read_text().splitlines() if "/" in line]
    paths = {line.split(maxsplit=5)[5].strip() for line in lines}
    return sorted({os.path.realpath(path) for path in paths if OPENMP.search(Path(path).name)})


def _ops() -> list[dict]:
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"landscape_fast.ops.{module.name}")
    rows = []
    for op, backends in sorted(_dispatch.OPS.items()):
        dtypes = dict.fromkeys(dtype for taken in backends.values() for dtype in taken)
        if not dtypes or any(dtype.is_floating_point for dtype in dtypes):
            dtypes = dict.fromkeys([*(dtypes or [torch.float32]), torch.float64])
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for dtype in dtypes:
                try:
                    backend, reason = _dispatch.explain(op, device, dtype)
                except ValueError as exc:
                    backend, reason = "error", str(exc)
                rows.append(
                    {
                        "op": op,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": backend,
                        "reason": reason,
                    }
                )
    return rows


def _warnings(report: dict) -> list[str]:
    found = []
    extension, cuda = report["extension"], report["cuda"]
    if extension["error"]:
        found.append(extension["error"])
    if extension["stale"]:
        found.append("csrc/ has changed since the extension was built; `pip install -e .` again")
    if len(report["openmp"]) > 1:
        found.append(
            f"{len(report['openmp'])} OpenMP runtimes in one process compete for the cores: "
            + ", ".join(report["openmp"])
        )
    built, driver = cuda["extension"], cuda["driver_supports"]
    if built and driver and int(built.split(".")[0]) > int(driver.split(".")[0]):
        found.append(
            f"the extension was built with CUDA {built}, the driver supports {driver}: its CUDA "
            "kernels cannot run; update the driver or build with an older nvcc"
        )
    for gpu in report["gpus"]:
        if built and not _has_code_for(extension["build"]["archs"], gpu["capability"]):
            found.append(
                f"the extension has no code for {gpu['name']} ({gpu['capability']}); rebuild it "
                f"with TORCH_CUDA_ARCH_LIST={gpu['capability']}"
            )
    if report["gpus"] and report["triton"]["version"] and not report["triton"]["c_compiler"]:
        found.append("Triton needs a C compiler to launch kernels; set CC or install gcc")
    return found


def _has_code_for(archs: list[str], capability: str) -> bool:
    gpu = int(capability.replace(".", ""))
    for kind, number, feature in re.findall(r"(sm|compute)_(\d+)([af]?)", " ".join(archs)):
        number = int(number)
        if number == gpu or (not feature and number < gpu and kind == "compute"):
            return True
        if kind == "sm" and not feature and number // 10 == gpu // 10 and number < gpu:
            return True
    return False


def as_text(report: dict) -> str:
    """The report as lines of at most a screen's width, warnings last."""
    package, extension, cuda = report["package"], report["extension"], report["cuda"]
    gpus = [f"{g['name']}, {g['capability']}, {g['memory_gib']} GiB" for g in report["gpus"]]
    build = extension["build"] or {}
    nvcc = f"CUDA {build.get('nvcc')} for {' '.join(build.get('archs', []))}"
    none = f"no CUDA kernels ({build.get('without_cuda')})"
    torch_part, triton = report["torch"], report["triton"]
    cuda_text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in cuda.items() if v)
    torch_text = ", ".join(f"{k} {v}" for k, v in torch_part.items() if v and k != "version")
    lines = [
        ("landscape_fast", f"{package['version']} in {package['path']}"),
        ("python", package["python"]),
        ("platform", package["platform"]),
        ("torch", f"{torch_part['version']}, {torch_text}"),
        ("gpus", "; ".join(gpus) or "none"),
        ("triton", f"{triton['version']}{', interpreted' if triton['interpreted'] else ''}"),
        ("extension", extension["loaded"] or "not loaded"),
    ]
    if build:
        lines += [
            ("  built by", f"{build.get('cxx')}; {nvcc if build.get('nvcc') else none}"),
            ("  flags", build.get("flags", "")),
            ("  CPU kernels", f"{extension['isa']} of {', '.join(build.get('isa', []))}"),
        ]
    lines += [
        ("CUDA versions", cuda_text or "-"),
        ("OpenMP", ", ".join(report["openmp"]) or "not known"),
        ("environment", ", ".join(f"{k}={v}" for k, v in report["environment"].items()) or "-"),
    ]
    text = [f"{name:<16}{value}" for name, value in lines]
    text += ["", f"{'op':<24}{'device':<8}{'backend':<9}dtypes: why"]
    dtypes = {}
    for row in report["ops"]:
        key = (row["op"], row["device"], row["backend"], row["reason"])
        dtypes.setdefault(key, []).append(row["dtype"])
    for (op, device, backend, reason), names in dtypes.items():
        text.append(f"{op:<24}{device:<8}{backend:<9}{', '.join(names)}: {reason}")
    text += [f"\nWARNING: {warning}" for warning in report["warnings"]]
    return "\n".join(text)
