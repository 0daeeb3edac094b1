"""Build of the optional native kernels; all metadata is in pyproject.toml.

The headers of the torch that is already installed are found without importing it, so that a plain
`pip install .` compiles next to that torch. Whatever stands in the way leaves a pure-Python
installation and a sentence in resunet_fast/_build_info.json; RESUNET_FAST_REQUIRE_EXT=1 makes it an
error instead.
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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp"))
DARWIN = sys.platform == "darwin"

# No -ffast-math: NaN has a meaning. No contraction: every instruction set gives the same bits.
# Nobody reads the floating-point exception flags, and keeping them exact would stop vectorisation.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"]
FLAGS += ["-ffp-contract=off", "-fno-trapping-math"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_FLAGS = {"kernels_avx2": ["-mavx2"], "kernels_avx512": AVX512}

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


class UnavailableError(Exception):
    """A sentence saying why there will be no native kernels."""


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


def write_ninja(path: Path, cxx: str, torch: Path, output: Path) -> None:
    """One compile edge per source with its own flags, one link edge."""
    x86 = len(instruction_sets()) > 1
    includes = [f"-isystem{torch / 'include'}", f"-isystem{sysconfig.get_path('include')}"]
    flags = [*FLAGS, *DEFINES, *(["-DRF_X86"] if x86 else []), *includes]
    link = (
        ["-bundle", "-undefined", "dynamic_lookup"] if DARWIN else ["-shared", "-Wl,--no-as-needed"]
    )
    link += [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    lines = [
        NINJA_RULES.format(
            directory=_escape(path.parent), cxx=cxx, flags=shlex.join(flags), link=shlex.join(link)
        )
    ]
    objects = []
    for source in SOURCES:
        if source.stem in X86_FLAGS and not x86:
            continue
        objects.append(_escape(path.parent / source.with_suffix(".o")))
        lines.append(f"build {objects[-1]}: compile {_escape(ROOT / source)}")
        lines.append(f"  extra = {shlex.join(X86_FLAGS.get(source.stem, []))}")
    lines.append(f"build {_escape(output)}: link {' '.join(objects)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def run_ninja(ninja: str, path: Path) -> None:
    """Compile and link; the first error line becomes the reason."""
    done = subprocess.run([ninja, "-f", str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    print(done.stdout + done.stderr, file=sys.stderr)
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line.strip() for line in lines if "error" in line.lower()]
    raise UnavailableError(f"compilation failed: {(errors or lines or ['no output'])[0]}")


class BuildExtension(build_ext):
    def run(self) -> None:
        output = Path(self.get_ext_fullpath("resunet_fast._C")).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"torch": None, "compiler": None, "flags": [], "isas": []}
        reason = None
        try:
            self._compile(output, info)
        except UnavailableError as error:
            reason = str(error)
            output.unlink(missing_ok=True)
            if os.environ.get("RESUNET_FAST_REQUIRE_EXT") == "1":
                raise CompileError(f"RESUNET_FAST_REQUIRE_EXT=1, but {reason}") from error
            print(f"resunet_fast is installed without native kernels: {reason}", file=sys.stderr)
        info["cpu"] = {"built": reason is None, "reason": reason}
        record = output.parent / "_build_info.json"
        record.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def _compile(self, output: Path, info: dict[str, object]) -> None:
        torch, info["torch"] = find_torch()
        cxx, info["compiler"] = find_compiler()
        info["flags"] = FLAGS
        directory = Path(self.build_temp).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        write_ninja(directory / "build.ninja", cxx, torch, output)
        run_ninja(find_ninja(), directory / "build.ninja")
        info["isas"] = instruction_sets()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One library for every Python from 3.10 on; without it the wheel is pure Python."""
        built = self.get_finalized_command("build_ext").get_outputs()
        return super().get_tag() if built else ("py3", "none", "any")


setup(
    ext_modules=[Extension("resunet_fast._C", [str(s) for s in SOURCES], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
