"""Compile every Triton kernel for NVIDIA GPUs without one, and look at the machine code.

python -m resunet_fast.testing.offline [--arch 90] [--match NAME] [--json FILE] [--update]

Kernels are compiled in a process of their own: one process cannot both interpret and compile, and
Triton decides when it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .addresses import narrow_addresses
from .demands import check_names, unmet
from .machine_code import Measurement, measure
from .offline_table import UPDATE, load, render, row, save, worse

if TYPE_CHECKING:
    from ..ops.triton_build import Build

MODULE = "resunet_fast.testing.offline"
PROCESSES = 2
TABLE = Path("tests/offline/table.json")


@dataclass(frozen=True)
class Result:
    """One build for one architecture: its measurement, and the demands that it breaks.

    `error` is what the compiler said if there is no machine code.
    """

    name: str
    arch: int
    kernel: str
    measurement: Measurement | None
    unmet: dict[str, str]
    error: str = ""

    @property
    def key(self) -> str:
        """Its name in the committed table."""
        return f"{self.name}/sm_{self.arch}"


def kernel_modules() -> list[str]:
    """Return the names of the modules that list builds: `triton_kernel` of every operator."""
    ops = import_module("resunet_fast.ops")
    names = [
        f"{ops.__name__}.{folder.name}.triton_kernel"
        for folder in pkgutil.iter_modules(ops.__path__)
        if folder.ispkg
    ]
    return [name for name in names if find_spec(name) is not None]


def builds(modules: Iterable[str]) -> list[Build]:
    """Return the builds of some modules, each once.

    Raises:
        ValueError: two different builds have the same name, or a demand is not known.
    """
    found: dict[str, Build] = {}
    for module in modules:
        for build in import_module(module).builds():
            check_names(build.name, build.demands)
            other = found.setdefault(build.name, build)
            if other != build:
                raise ValueError(f"builds: expected different names, got {build.name!r} twice")
    return list(found.values())


def main_builds(every: Iterable[Build]) -> list[Build]:
    """Return the first build of each kernel: what is compiled where time is short."""
    first: dict[str, Build] = {}
    for build in every:
        first.setdefault(qualified(build), build)
    return list(first.values())


def qualified(build: Build) -> str:
    """Return the name of a build's kernel with its module."""
    return f"{build.kernel.fn.__module__}.{build.kernel.fn.__name__}"


def compile_build(build: Build, arch: int) -> Result:
    """Compile one build, measure it and check its demands."""
    kernel = qualified(build)
    try:
        measurement = _measure(build, arch)
    except Exception as error:  # whatever the compiler raises is reported, and exit code 1
        lines = str(error).strip().splitlines() or [repr(error)]
        message = f"{type(error).__name__}: {lines[-1]}"
        return Result(build.name, arch, kernel, None, {}, message)
    return Result(build.name, arch, kernel, measurement, unmet(measurement, arch, build.demands))


def _measure(build: Build, arch: int) -> Measurement:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: (i,) for i, name in enumerate(build.kernel.arg_names)}
    aligned = {position[name]: [["tt.divisibility", 16]] for name in build.aligned}
    source = ASTSource(build.kernel, dict(build.signature), dict(build.constexprs), aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    disassembly = _disassemble(compiled.asm["cubin"])
    narrow = narrow_addresses(compiled.asm["ttir"])
    return measure(log.getvalue(), disassembly, compiled.metadata.shared, narrow)


def _disassemble(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_here(
    modules: Sequence[str], architectures: Sequence[int], match: str = "", main_only: bool = False
) -> list[Result]:
    """Compile in this process and its children; see :func:`run`."""
    wanted = builds(modules)
    if main_only:
        wanted = main_builds(wanted)
    global _work
    _work = [
        (build, arch)
        for build in wanted
        if match in build.name
        for arch in build.architectures
        if arch in architectures
    ]
    # Forked: kernels cannot be sent to another process, and Triton is loaded once.
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        return pool.map(_compile_number, range(len(_work)), chunksize=1)


_work: list[tuple[Build, int]] = []


def _compile_number(number: int) -> Result:
    return compile_build(*_work[number])


def run(
    modules: Sequence[str] | None = None,
    architectures: Sequence[int] = (80, 90, 100),
    match: str = "",
    main_only: bool = False,
) -> list[Result]:
    """Compile builds in a process that does not interpret, and return what came of each.

    Args:
        modules: those that list the builds; by default those of the operators.
        architectures: compute capabilities; a build is compiled for those that it names itself.
        match: only builds with this in their name.
        main_only: only the first build of each kernel.

    Raises:
        RuntimeError: the process failed; the message is the end of its error output.
    """
    names = kernel_modules() if modules is None else list(modules)
    request = json.dumps([names, list(architectures), match, main_only])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        # No settings of Triton's own are inherited. Everything is compiled anew: the cache does
        # not check its entries, and the assembler's log exists only when it runs.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment |= {
            "TRITON_CACHE_DIR": folder,
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", MODULE, "--child", request, "--json", str(output)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"compiling failed: {child.stderr.strip()[-2000:]}")
        return [_from_json(entry) for entry in json.loads(output.read_text())]


def _from_json(entry: dict[str, Any]) -> Result:
    measurement = entry.pop("measurement")
    if measurement is not None:
        measurement["narrow_addresses"] = tuple(measurement["narrow_addresses"])
        measurement = Measurement(**measurement)
    return Result(measurement=measurement, **entry)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Compile every Triton kernel without a GPU and look at the machine code.",
    )
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; default: all")
    parser.add_argument("--match", default="", help="only builds with this in their name")
    parser.add_argument("--module", action="append", help="where builds() is; default: operators")
    parser.add_argument("--main", action="store_true", help="only the first build of each kernel")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"default: {TABLE}")
    parser.add_argument("--update", action="store_true", help="write the results into the table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a build fails to compile, breaks a demand or became worse."""
    options = _parser().parse_args(argv)
    if options.child:
        results = compile_here(*json.loads(options.child))
        options.json.write_text(json.dumps([asdict(result) for result in results]))
        return 0
    architectures = options.arch or (80, 90, 100)
    results = run(options.module, architectures, options.match, options.main)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    rows = {r.key: row(r.measurement) for r in results if r.measurement is not None}
    print(render(rows.items()))
    failures = problems(results)
    if options.update:
        _update(options.table, rows, complete=not (options.arch or options.match or options.main))
    else:
        failures += compare(results, options.table)
    print("\n".join(failures) or f"{len(results)} builds: OK")
    return 1 if failures else 0


def problems(results: Iterable[Result]) -> list[str]:
    """Return a sentence for each build that does not compile and each demand that is broken."""
    found = []
    for result in results:
        if result.measurement is None:
            found.append(f"{result.key}: does not compile: {result.error}")
        found += [f"{result.key}: {name}: {why}" for name, why in result.unmet.items()]
    return found


def compare(results: Iterable[Result], path: Path) -> list[str]:
    """Return a sentence for each way in which results are worse than a committed table."""
    if not path.exists():
        return [f"{path}: expected the committed table, there is none; {UPDATE}"]
    made_by, rows = load(path)
    installed = version("triton")
    if made_by != installed:
        return [
            f"{path}: expected the table of triton {installed}, got that of {made_by}; {UPDATE}"
        ]
    found = []
    for result in results:
        if result.key not in rows:
            found.append(f"{result.key}: it is not in {path}; {UPDATE}")
        elif result.measurement is not None:
            found += worse(result.key, row(result.measurement), rows[result.key])
    return found


def _update(path: Path, rows: dict[str, dict[str, Any]], complete: bool) -> None:
    """Replace the table, or with an incomplete run the rows that it has."""
    old = {} if complete or not path.exists() else load(path)[1]
    save(path, version("triton"), old | rows)


if __name__ == "__main__":
    raise SystemExit(main())
