"""How the CUDA library is built and loaded, what its code is like, and every way that can fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_code
import emulation
import pytest
import torch
from torch._subclasses import FakeTensorMode

from resunet_fast import native
from resunet_fast.ops.backends import cuda_refusals

ROOT = emulation.ROOT
SCRIPT = emulation.setup_script()
PACKAGE = Path(native.__file__).parent
LIBRARIES = [path for path in (native._library("_C"), native._library("_CUDA")) if path]
TABLE = json.loads(cuda_code.TABLE.read_text())


def _nvcc_is_here() -> bool:
    try:
        cuda_code.nvcc()
    except SCRIPT["UnavailableError"]:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _nvcc_is_here(), reason="nvcc not found")
needs_native = pytest.mark.skipif(
    bool(native.unavailable()), reason="; ".join(native.unavailable())
)
architectures = pytest.mark.parametrize(
    "architecture",
    [a if a == "90" else pytest.param(a, marks=pytest.mark.slow) for a in cuda_code.ARCHITECTURES],
)


@needs_nvcc
@architectures
@pytest.mark.parametrize("source", cuda_code.SOURCES, ids=lambda path: path.stem)
def test_machine_code(source: Path, architecture: str, tmp_path: Path) -> None:
    """No warning, no spill, no more registers than in the table, accesses of 16 bytes."""
    cubin, usage = cuda_code.compile_for(source, architecture, tmp_path)
    assert usage
    exact = cuda_code.nvcc().version == TABLE["nvcc"]
    for name, found in usage.items():
        registers, spills, shared = TABLE["kernels"][name][architecture]
        assert found.spills == spills == 0, name
        assert found.shared == shared, name
        # Another release of ptxas allocates otherwise.
        assert found.registers <= (registers if exact else registers + 32), name
    nvdisasm = cuda_code.disassembler()
    assert nvdisasm is not None, "nvdisasm is neither in the toolkit nor in Triton's wheel"
    code = cuda_code.instructions(cubin, nvdisasm)
    for name in usage.keys() & {name for name in usage if _is_vectorised(name)}:
        assert any(re.match(r"LDG\.E(\.\w+)*\.128", i) for i in code[name]), name
        reduces = "stats" in name or "sums" in name
        stores = any(re.match(r"STG\.E(\.\w+)*\.128", i) for i in code[name])
        assert stores or reduces, name
    for name in usage:
        assert not any(i.startswith(("LDL", "STL")) for i in code[name]), name


def _is_vectorised(name: str) -> bool:
    return re.search(r"<(float, 4|BFloat16, 8|Float16, 8)\b", name) is not None


def test_the_table_covers_every_kernel_and_architecture() -> None:
    kernels = set()
    for source in cuda_code.SOURCES:
        kernels |= set(re.findall(r"__global__ void [^(]*\([^)]*\) (\w+)\(", source.read_text()))
    assert {name.split("<")[0] for name in TABLE["kernels"]} == kernels
    for rows in TABLE["kernels"].values():
        assert tuple(rows) == cuda_code.ARCHITECTURES


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is needed to list a library's symbols")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_only_symbols_of_the_stable_abi_are_missing(library: Path) -> None:
    """What torch and Python must provide; the C and C++ runtimes version theirs."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    ours = {
        s for s in symbols if "@" not in s and not s.startswith(("_ITM_", "__", "_ZNSt", "_ZSt"))
    }
    allowed = (Path(__file__).parent / "cuda/stable_symbols.txt").read_text().split()
    assert ours <= set(allowed), ours - set(allowed)
    assert not any(s.startswith(("cuda", "_ZN2at", "_ZN3c10")) for s in symbols)


def test_kernels_include_no_header_of_torch() -> None:
    """Which would multiply the time of nvcc: its front end reads them once per architecture."""
    for path in (ROOT / "csrc/cuda/kernels").iterdir():
        assert "torch/" not in path.read_text()


@pytest.fixture
def nvcc_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a CUDA_HOME whose nvcc answers questions and does `body` otherwise."""

    def make(body: str) -> None:
        path = tmp_path / "bin/nvcc"
        path.parent.mkdir()
        answers = 'case "$1" in --version) echo "release 13.0, V13.0.1"; exit;;\n'
        answers += "--list-gpu-code) echo sm_80 sm_90 sm_90a sm_100; exit;; esac\n"
        path.write_text(f"#!/bin/sh\n{answers}{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    for name in ("RESUNET_FAST_CUDA", "RESUNET_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return make


def test_architectures(nvcc_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc_in("exit 1")
    found = SCRIPT["find_nvcc"]()
    assert (found.version, found.architectures) == ("13.0.1", ["80", "90", "100"])
    targets = [flag for flag in found.flags() if flag.startswith("-gencode")]
    assert targets[-1] == "-gencode=arch=compute_100,code=compute_100"
    assert len(targets) == 4
    monkeypatch.setenv("RESUNET_FAST_CUDA_ARCHS", "90, 80")
    assert SCRIPT["find_nvcc"]().architectures == ["80", "90"]
    for wrong in ("hopper", "90a"):
        monkeypatch.setenv("RESUNET_FAST_CUDA_ARCHS", wrong)
        sentence = f"RESUNET_FAST_CUDA_ARCHS: expected some of 80, 90, 100, got '{wrong}'"
        with pytest.raises(SCRIPT["UnavailableError"], match=sentence):
            SCRIPT["find_nvcc"]()


def test_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("RESUNET_FAST_CUDA", raising=False)
    with pytest.raises(SCRIPT["UnavailableError"], match=f"nvcc not found in CUDA_HOME={tmp_path}"):
        SCRIPT["find_nvcc"]()
    monkeypatch.setenv("RESUNET_FAST_CUDA", "0")
    with pytest.raises(SCRIPT["UnavailableError"], match="switched off by RESUNET_FAST_CUDA=0"):
        SCRIPT["find_nvcc"]()


def _builder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py's command, with a CPU library that is there already."""
    from setuptools import Distribution

    command = SCRIPT["BuildExtension"](Distribution())
    command.build_temp = str(directory / "temp")
    command.get_ext_fullpath = lambda name: str(directory / (name.split(".")[1] + ".abi3.so"))
    (directory / "temp").mkdir()
    (directory / "temp/build.ninja").write_text(
        SCRIPT["NINJA_RULES"].format(directory=directory, cxx="true", flags="", link="")
    )
    monkeypatch.setattr(command, "_compile", lambda *_: None)
    return command


def test_nvcc_that_fails(
    nvcc_in: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nvcc_in("echo 'x.cu(1): error: out of order'; exit 1")
    monkeypatch.delenv("RESUNET_FAST_REQUIRE_EXT", raising=False)
    _builder(tmp_path, monkeypatch).run()
    info = json.loads((tmp_path / "_build_info.json").read_text())
    reason = "compilation failed: x.cu(1): error: out of order"
    assert info["cpu"] == {"built": True, "reason": None}
    assert info["cuda"] == {"built": False, "reason": reason}
    assert f"installed without CUDA kernels: {reason}" in capsys.readouterr().err


def test_required_libraries_that_fail(
    nvcc_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by RESUNET_FAST_REQUIRE_EXT=1, nvcc must not fail where there is one."""
    monkeypatch.setenv("RESUNET_FAST_REQUIRE_EXT", "1")
    command = _builder(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    command.run()
    info = json.loads((tmp_path / "_build_info.json").read_text())
    assert info["cuda"]["reason"].startswith("nvcc not found")
    nvcc_in("echo 'x.cu(1): error: out of order'; exit 1")
    with pytest.raises(Exception, match="=1, but the CUDA library: compilation failed"):
        command.run()


def test_without_torch_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESUNET_FAST_REQUIRE_EXT", raising=False)
    command = _builder(tmp_path, monkeypatch)
    reason = "torch was not found"

    def missing(*_: Any) -> None:
        raise SCRIPT["UnavailableError"](reason)

    monkeypatch.setattr(command, "_compile", missing)
    (tmp_path / "_CUDA.abi3.so").write_bytes(b"from an earlier build")
    command.run()
    info = json.loads((tmp_path / "_build_info.json").read_text())
    assert info["cpu"] == info["cuda"] == {"built": False, "reason": reason}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation of its own: what native.py loads comes from this directory."""
    monkeypatch.setattr(native, "_DIRECTORY", tmp_path)
    remembered = (native.build_info, native.unavailable, native.cuda_unavailable)
    for function in remembered:
        function.cache_clear()
    yield tmp_path
    for function in remembered:
        function.cache_clear()


def test_missing_libraries(package: Path) -> None:
    assert native.unavailable() == ["the compiled library is not installed (it was never built)"]
    assert native.cuda_unavailable() == native.unavailable()
    record = {"cpu": {"built": False, "reason": "no C++ compiler: c++/g++ not found"}}
    (package / "_build_info.json").write_text(json.dumps(record))
    native.build_info.cache_clear()
    native.unavailable.cache_clear()
    expected = "the compiled library is not installed (no C++ compiler: c++/g++ not found)"
    assert native.unavailable() == [expected]


@needs_native
def test_a_missing_cuda_library(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", list)
    record = {"cuda": {"built": False, "reason": "nvcc not found"}}
    (package / "_build_info.json").write_text(json.dumps(record))
    assert native.cuda_unavailable() == ["the CUDA library is not installed (nvcc not found)"]


def test_a_cuda_library_next_to_a_torch_without_cuda(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unavailable", list)
    monkeypatch.setattr(native.torch.version, "cuda", None)
    (package / "_CUDA.abi3.so").write_bytes(b"it is not looked at")
    (reason,) = native.cuda_unavailable()
    assert re.fullmatch(r"the CUDA library was built, but this torch \(.*\) is CPU-only", reason)
    with FakeTensorMode():
        assert cuda_refusals(torch.empty(1, device="cuda")) == [reason]


IN_A_CHILD = """
import sys
from pathlib import Path
import torch
import resunet_fast as rf
from resunet_fast import native
directory, first = Path(sys.argv[1]), sys.argv[2:]
native._DIRECTORY = directory
for path in first:
    torch.ops.load_library(path)
print(native.unavailable())
x = torch.randn(2, 3, 8, 8)
assert torch.equal(rf.functional.upsample(x, (8, 8), "nearest"), x)
print(rf.explain("bn_act", x).chosen)
"""


def _loaded_from(directory: Path, *first: Path) -> list[str]:
    """What native.py says of the libraries in a directory, and which implementation then runs."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD, str(directory), *map(str, first)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"RESUNET_FAST_DISABLE_NATIVE": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_native
def test_a_truncated_library(package: Path) -> None:
    """Loading one would end the process by a bus error."""
    whole = LIBRARIES[0].read_bytes()
    for length in (0, 10, 60, 5000, len(whole) - 1):
        (package / "_C.abi3.so").write_bytes(whole[:length])
        native.unavailable.cache_clear()
        expected = "the compiled library _C.abi3.so is truncated; install resunet_fast again"
        assert native.unavailable() == [expected], length
    _, chosen = _loaded_from(package)
    assert chosen == "reference"


@needs_native
def test_a_library_for_a_newer_torch(tmp_path: Path) -> None:
    """It lacks a symbol; the sentence names both versions."""
    source = tmp_path / "newer.cpp"
    source.write_text('extern "C" int torch_of_tomorrow(); int unresolved = torch_of_tomorrow();')
    cxx, _ = SCRIPT["find_compiler"]()
    output = tmp_path / "_C.abi3.so"
    subprocess.run([cxx, "-shared", "-fPIC", str(source), "-o", str(output)], check=True)
    (tmp_path / "_build_info.json").write_text(json.dumps({"torch": "9.0.0"}))
    reason, chosen = _loaded_from(tmp_path)
    assert "undefined symbol: torch_of_tomorrow (built next to torch 9.0.0, loaded by" in reason
    assert chosen == "reference"


@needs_native
def test_a_library_that_is_loaded_twice(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    shutil.copy(LIBRARIES[0], other)
    reason, chosen = _loaded_from(PACKAGE, other)
    assert "another copy of _C.abi3.so is loaded already and has registered its kernels" in reason
    assert chosen == "reference"
    reason, chosen = _loaded_from(PACKAGE, LIBRARIES[0])
    assert (reason, chosen) == ("[]", "cpu")
