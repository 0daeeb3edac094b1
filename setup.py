"""Build of the optional native kernels; all metadata is in pyproject.toml.

The headers of the torch that is already installed are found without importing it, so that a plain
`pip install .` compiles next to that torch. Whatever stands in the way leaves a pure-Python
installation and a sentence in resunet_fast/_build_info.json; RESUNET_FAST_REQUIRE_EXT=1 makes it an
error instead. The CUDA kernels are a second library, built where nvcc is found, GPU or not.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*"))
SOURCES = [path for path in FILES if path.suffix == ".cpp" and path.parts[1] != "cuda"]
CUDA_SOURCES = [path for path in FILES if path.suffix in (".cpp", ".cu") and path not in SOURCES]
NAMES = ("_C", "_CUDA")
DARWIN = sys.platform == "darwin"

# No -ffast-math: NaN has a meaning. No contraction: every instruction set gives the same bits.
# Nobody reads the floating-point exception flags, and keeping them exact would stop vectorisation.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"]
FLAGS += ["-ffp-contract=off", "-fno-trapping-math"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_FLAGS = {"kernels_avx2": ["-mavx2", "-mfma"], "kernels_avx512": AVX512}

# A100, H100 and H200, B200; newer GPUs compile the PTX of the last one when they load it.
CUDA_ARCHITECTURES = ["80", "90", "100"]
# No contraction, as on the CPU: both devices compute the same bits from the same statistics.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-Werror=all-warnings"]

NINJA_RULES = """\
builddir = {directory}
rule compile
  command = {cxx} {flags} $extra -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {cxx} $in {link} -o $out
"""
CUDA_RULES = """\
rule nvcc
  command = {nvcc} {nvcc_flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule nvcc_link
  command = {nvcc} -shared -cudart=static -ccbin={cxx} $in {nvcc_link} -o $out
"""


class UnavailableError(Exception):
    """A sentence saying why there will be no native kernels."""


Build = Callable[[Path, "dict[str, object]"], None]


def search_path() -> list[str]:
    """Where the user's environment looks for packages, from inside pip's isolated build too."""
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")
    outside = {name: value for name, value in os.environ.items() if name not in isolation}
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    answer = subprocess.run(
        [sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=True
    )
    outer: list[str] = json.loads(answer.stdout)
    return [*outer, *sys.path[1:]]


def find_torch() -> tuple[Path, str]:
    """The installed torch's directory and version, without importing it."""
    for directory in search_path():
        torch = Path(directory) / "torch"
        if (torch / "include/torch/csrc/stable/library.h").exists():
            match = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
            return torch, match.group(1) if match else "unknown"
    raise UnavailableError(
        f"torch was not found in {sysconfig.get_path('purelib')}; install torch>=2.11 first, then"
        " reinstall resunet_fast"
    )


def find_compiler() -> tuple[str, str]:
    """The compiler's command and the first line of its version."""
    if sys.platform == "win32":
        raise UnavailableError("the native kernels are not built on Windows")
    command = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not command:
        raise UnavailableError("no C++ compiler: c++/g++ not found")
    try:
        version = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"no C++ compiler: `{command} --version` fails ({error})") from error
    return command, version.stdout.splitlines()[0] if version.stdout else command


def find_ninja() -> str:
    """The ninja executable of the build requirements, or any other."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if not found:
        raise UnavailableError("ninja was not found; install it, or build with build isolation")
    return found


def instruction_sets() -> list[str]:
    """The compilations of the loops, beginning with the one that runs everywhere."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ["default", "avx2", "avx512"] if x86 else ["default"]


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler, and the compute capabilities that it is asked for, such as "90"."""

    command: str
    version: str
    architectures: list[str]

    def flags(self) -> list[str]:
        """Machine code for each capability, and PTX for GPUs newer than the last."""
        pairs = [(a, f"sm_{a}") for a in self.architectures]
        pairs.append((self.architectures[-1], f"compute_{self.architectures[-1]}"))
        return [*NVCC_FLAGS, *(f"-gencode=arch=compute_{a},code={code}" for a, code in pairs)]


def find_nvcc() -> Nvcc:
    """nvcc from CUDA_HOME, PATH or its usual place; no GPU is asked for."""
    if os.environ.get("RESUNET_FAST_CUDA", "1") == "0":
        raise UnavailableError("switched off by RESUNET_FAST_CUDA=0")
    home = os.environ.get("CUDA_HOME")
    if home:
        command = shutil.which("nvcc", path=str(Path(home) / "bin"))
    else:
        command = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not command:
        raise UnavailableError("nvcc not found" + (f" in CUDA_HOME={home}" if home else ""))
    version, known = (_nvcc_output(command, flag) for flag in ("--version", "--list-gpu-code"))
    release = re.search(r"release [\d.]+, V([\d.]+)", version)
    return Nvcc(command, release.group(1) if release else "unknown", _architectures(known.split()))


def _nvcc_output(command: str, flag: str) -> str:
    try:
        done = subprocess.run([command, flag], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"`{command} {flag}` fails ({error})") from error
    return done.stdout


def _architectures(known: list[str]) -> list[str]:
    wanted = re.split(r"[ ,;]+", os.environ.get("RESUNET_FAST_CUDA_ARCHS", "").strip())
    if wanted == [""]:
        usable = [a for a in CUDA_ARCHITECTURES if f"sm_{a}" in known]
        if not usable:
            raise UnavailableError(f"this nvcc compiles for none of sm_{CUDA_ARCHITECTURES}")
        return usable
    for architecture in wanted:
        # Not such as 90a: its code would run on no other GPU, and nothing here asks for it.
        if f"sm_{architecture}" not in known or not architecture.isdecimal():
            names = (name.removeprefix("sm_") for name in known)
            expected = ", ".join(name for name in names if name.isdecimal())
            raise UnavailableError(
                f"RESUNET_FAST_CUDA_ARCHS: expected some of {expected}, got {architecture!r}"
            )
    return sorted(wanted, key=int)


def write_ninja(path: Path, cxx: str, torch: Path, output: Path) -> None:
    """The CPU library: one compile edge per source with its own flags, one link edge."""
    x86 = len(instruction_sets()) > 1
    flags = [*FLAGS, *DEFINES, *(["-DRF_X86"] if x86 else []), *_includes(torch)]
    link = (
        ["-bundle", "-undefined", "dynamic_lookup"] if DARWIN else ["-shared", "-Wl,--no-as-needed"]
    )
    link += _libraries(torch)
    lines = [
        NINJA_RULES.format(
            directory=_escape(path.parent), cxx=cxx, flags=shlex.join(flags), link=shlex.join(link)
        )
    ]
    objects = []
    for source in SOURCES:
        if source.stem in X86_FLAGS and not x86:
            continue
        objects.append(_object(path, source))
        lines.append(f"build {objects[-1]}: compile {_escape(ROOT / source)}")
        lines.append(f"  extra = {shlex.join(X86_FLAGS.get(source.stem, []))}")
    lines.append(f"build {_escape(output)}: link {' '.join(objects)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def add_cuda(path: Path, cxx: str, nvcc: Nvcc, torch: Path, output: Path) -> None:
    """Append the CUDA library to the build file. The kernels include no header of torch."""
    link = ["-Xlinker=--no-as-needed,--exclude-libs=ALL", *_libraries(torch)]
    flags = {"nvcc": nvcc.command, "nvcc_flags": shlex.join(nvcc.flags())}
    lines = [CUDA_RULES.format(**flags, cxx=cxx, nvcc_link=shlex.join(link))]
    objects = []
    for source in CUDA_SOURCES:
        objects.append(_object(path, source))
        rule = "nvcc" if source.suffix == ".cu" else "compile"
        lines.append(f"build {objects[-1]}: {rule} {_escape(ROOT / source)}")
        if rule == "compile":
            lines.append("  extra = -DUSE_CUDA")
    lines.append(f"build {_escape(output)}: nvcc_link {' '.join(objects)}")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _includes(torch: Path) -> list[str]:
    return [f"-isystem{torch / 'include'}", f"-isystem{sysconfig.get_path('include')}"]


def _libraries(torch: Path) -> list[str]:
    return [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _object(path: Path, source: Path) -> str:
    return _escape(path.parent / source.with_suffix(".o"))


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def run_ninja(ninja: str, path: Path, target: Path) -> None:
    """Compile and link one library; the first error line becomes the reason."""
    command = [ninja, "-f", str(path), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    print(done.stdout + done.stderr, file=sys.stderr)
    lines = (done.stdout + done.stderr).splitlines()
    errors = [
        line.strip() for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)
    ]
    raise UnavailableError(f"compilation failed: {(errors or lines or ['no output'])[0]}")


class BuildExtension(build_ext):
    def run(self) -> None:
        libraries = [Path(self.get_ext_fullpath(f"resunet_fast.{name}")) for name in NAMES]
        cpu, cuda = (path.resolve() for path in libraries)
        cpu.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"torch": None, "compiler": None, "flags": [], "isas": []}
        reason = self._try(self._compile, cpu, info)
        if reason is not None:
            self._require(f"RESUNET_FAST_REQUIRE_EXT=1, but {reason}")
            print(f"resunet_fast is installed without native kernels: {reason}", file=sys.stderr)
        info["cpu"] = {"built": reason is None, "reason": reason}
        reason = self._try(self._compile_cuda, cuda, info) if reason is None else reason
        if reason is not None:
            if "nvcc" in info:
                self._require(f"RESUNET_FAST_REQUIRE_EXT=1, but the CUDA library: {reason}")
            print(f"resunet_fast is installed without CUDA kernels: {reason}", file=sys.stderr)
        info["cuda"] = {"built": reason is None, "reason": reason}
        record = cpu.parent / "_build_info.json"
        record.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def _try(self, build: Build, output: Path, info: dict[str, object]) -> str | None:
        """Build a library; what stands in the way is returned, and no old one stays."""
        try:
            build(output, info)
        except UnavailableError as error:
            output.unlink(missing_ok=True)
            return str(error)
        return None

    def _require(self, sentence: str) -> None:
        if os.environ.get("RESUNET_FAST_REQUIRE_EXT") == "1":
            raise CompileError(sentence)

    def _rules(self) -> Path:
        return Path(self.build_temp).resolve() / "build.ninja"

    def _compile(self, output: Path, info: dict[str, object]) -> None:
        torch, info["torch"] = find_torch()
        cxx, info["compiler"] = find_compiler()
        info["flags"] = FLAGS
        rules = self._rules()
        rules.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(rules, cxx, torch, output)
        run_ninja(find_ninja(), rules, output)
        info["isas"] = instruction_sets()

    def _compile_cuda(self, output: Path, info: dict[str, object]) -> None:
        nvcc = find_nvcc()
        info["nvcc"], info["architectures"] = nvcc.version, nvcc.architectures
        add_cuda(self._rules(), find_compiler()[0], nvcc, find_torch()[0], output)
        run_ninja(find_ninja(), self._rules(), output)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One library for every Python from 3.10 on; without it the wheel is pure Python."""
        built = self.get_finalized_command("build_ext").get_outputs()
        return super().get_tag() if built else ("py3", "none", "any")


setup(
    ext_modules=[
        Extension(f"resunet_fast.{name}", [str(path) for path in sources], py_limited_api=True)
        for name, sources in zip(NAMES, (SOURCES, CUDA_SOURCES), strict=True)
    ],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
