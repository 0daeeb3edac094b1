"""setup.py: what an installation builds, what it says when it cannot, when it fails."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
BUILT_HERE = shutil.ignore_patterns("*.so", "*.new", "__pycache__", "_build_info.json")
slow = pytest.mark.slow


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that setup.py defines, without running setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_torch_is_found_without_importing_it(script: dict[str, Any]) -> None:
    import torch

    directory, version = script["find_torch"]()
    assert directory.resolve() == Path(torch.__file__).resolve().parent
    assert version == torch.__version__


def test_a_missing_torch_is_a_sentence(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script["find_torch"].__globals__, "search_path", lambda: [str(tmp_path)])
    with pytest.raises(script["UnavailableError"], match=r"torch was not found in .*install torch"):
        script["find_torch"]()


def test_a_missing_compiler_is_a_sentence(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        script["UnavailableError"], match=r"no C\+\+ compiler: c\+\+/g\+\+ not found"
    ):
        script["find_compiler"]()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(script["UnavailableError"], match=r"`no-such-compiler --version` fails"):
        script["find_compiler"]()


def test_only_the_loops_are_compiled_for_newer_cpus(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ninja = script["write_ninja"]
    monkeypatch.setitem(write_ninja.__globals__, "instruction_sets", lambda: ["default", "avx2"])
    rules = tmp_path / "build.ninja"
    write_ninja(rules, "c++", tmp_path / "torch", tmp_path / "_C.abi3.so")
    edges = rules.read_text().split("\nbuild ")[1:]
    with_flags = [edge.split(":")[0] for edge in edges if "-mavx" in edge]
    assert [Path(name).stem for name in with_flags] == ["kernels_avx2", "kernels_avx512"]
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").rglob("*.cpp")]
    assert len(edges) == len(sources) + 1
    assert "fast-math" not in rules.read_text()


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is needed to list an object's symbols")
def test_the_loops_share_no_code_with_other_objects(script: dict[str, Any], tmp_path: Path) -> None:
    """An inline function common to all objects could be kept in its AVX-512 version."""
    cxx, _ = script["find_compiler"]()
    source, target = ROOT / "csrc/cpu/kernels_default.cpp", tmp_path / "kernels.o"
    # Without optimisation every inline function that is used stays in the object.
    subprocess.run([cxx, "-std=c++17", "-O0", "-c", str(source), "-o", str(target)], check=True)
    listed = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True)
    kinds = {line[17]: line for line in listed.stdout.splitlines() if len(line) > 18}
    assert "t" in kinds
    assert not kinds.keys() & {"W", "V", "u"}


class Environment:
    """A fresh virtual environment and a copy of the sources, as a user would have them."""

    def __init__(self, directory: Path, with_torch: bool) -> None:
        self.directory = directory
        self.source = directory / "source"
        self.python = directory / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(self.output("-c", purelib).strip())
        if with_torch:
            (self.site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.source.mkdir()
        for name in ("csrc", "resunet_fast"):
            shutil.copytree(ROOT / name, self.source / name, ignore=BUILT_HERE)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, self.source / name)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")}
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment | variables,
            cwd=self.directory,
        )

    def output(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        pip = ("-m", "pip", "install", "-v", "--disable-pip-version-check")
        return self.run(*pip, *options, str(self.source), **variables)

    def installed(self) -> dict[str, Any]:
        """The record of a successful plain installation."""
        record = self.site / "resunet_fast" / "_build_info.json"
        contents: dict[str, Any] = json.loads(record.read_text())
        return contents

    def native_isa(self) -> str:
        code = (
            "from resunet_fast import native; assert native.unavailable() == [],"
            " native.unavailable(); print(native.ops().cpu_isa())"
        )
        return self.output("-c", code).strip()


@pytest.fixture
def next_to_torch(tmp_path: Path) -> Environment:
    return Environment(tmp_path, with_torch=True)


@slow
def test_install_next_to_torch(next_to_torch: Environment) -> None:
    done = next_to_torch.install(RESUNET_FAST_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Collecting torch" not in done.stdout
    assert not (next_to_torch.site / "torch").exists()
    info = next_to_torch.installed()
    assert info["cpu"] == {"built": True, "reason": None}
    assert next_to_torch.native_isa() in info["isas"]
    (wheel,) = next_to_torch.site.glob("resunet_fast-*.dist-info/WHEEL")
    assert "Tag: cp310-abi3-" in wheel.read_text()
    assert not (next_to_torch.source / "resunet_fast" / "_build_info.json").exists()


@slow
def test_editable_install_next_to_torch(next_to_torch: Environment) -> None:
    done = next_to_torch.install("-e", RESUNET_FAST_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    package = next_to_torch.source / "resunet_fast"
    info = json.loads((package / "_build_info.json").read_text())
    assert info["cpu"]["built"]
    assert (package / "_C.abi3.so").exists()
    assert next_to_torch.native_isa() in info["isas"]


@slow
def test_install_without_torch(tmp_path: Path) -> None:
    bare = Environment(tmp_path, with_torch=False)
    done = bare.install()
    assert done.returncode == 0, done.stdout + done.stderr
    printed = "resunet_fast is installed without native kernels: torch was not found"
    assert printed in done.stdout + done.stderr
    info = bare.installed()
    assert not info["cpu"]["built"]
    assert f"torch was not found in {bare.site}; install torch" in info["cpu"]["reason"]
    (wheel,) = bare.site.glob("resunet_fast-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    failed = bare.run("-c", "import resunet_fast")
    assert "resunet_fast needs PyTorch 2.11 or newer, which is not installed" in failed.stderr


def failing_compiler(directory: Path) -> str:
    path = directory / "failing-c++"
    version = 'if [ "$1" = --version ]; then echo "failing 1.0"; exit 0; fi'
    path.write_text(f"#!/bin/sh\n{version}\necho 'x.cpp:1:1: error: out of order' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_failing_compiler(next_to_torch: Environment, editable: bool) -> None:
    cxx = failing_compiler(next_to_torch.directory)
    done = next_to_torch.install(*(["-e"] if editable else []), CXX=cxx)
    assert done.returncode == 0, done.stdout + done.stderr
    record = next_to_torch.source if editable else next_to_torch.site
    info = json.loads((record / "resunet_fast" / "_build_info.json").read_text())
    reason = "compilation failed: x.cpp:1:1: error: out of order"
    assert info["cpu"] == {"built": False, "reason": reason}
    assert info["compiler"] == "failing 1.0"
    code = "from resunet_fast import native; print(native.unavailable())"
    assert reason in next_to_torch.output("-c", code)


@slow
def test_missing_compiler(next_to_torch: Environment) -> None:
    done = next_to_torch.install(CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler: `no-such-compiler" in next_to_torch.installed()["cpu"]["reason"]


@slow
def test_required_extension_fails_hard(next_to_torch: Environment) -> None:
    done = next_to_torch.install(CXX="no-such-compiler", RESUNET_FAST_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "RESUNET_FAST_REQUIRE_EXT=1, but no C++ compiler" in done.stdout + done.stderr
    assert not (next_to_torch.site / "resunet_fast").exists()
