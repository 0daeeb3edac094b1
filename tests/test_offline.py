"""The offline check of the Triton kernels: that it sees every fault, and what it says of ours."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import resunet_fast
from resunet_fast.testing import demands, offline, offline_table
from resunet_fast.testing.machine_code import Measurement
from resunet_fast.testing.offline import Result

toys = pytest.importorskip("toy_kernels", reason="Triton is not installed")

TABLE = Path(__file__).parent / "offline" / "table.json"
PLAIN = Measurement(
    registers=40,
    spilled=0,
    shared=1024,
    instructions=400,
    k_step=100,
    matrix="HGMMA",
    matrix_count=4,
    from_shared=4,
    ldmatrix=0,
    serialised="",
    atomics=0,
    tma_loads=2,
    tma_stores=1,
    loads=64,
    loads_16=64,
    stores=32,
    stores_16=32,
)


def test_every_fault_is_caught_and_nothing_else() -> None:
    results = {result.key: result for result in offline.run(["toy_kernels"])}
    expected = {f"{b.name}/sm_{arch}": set() for b in toys.good() for arch in b.architectures}
    expected |= {
        f"{name}/sm_{build.architectures[0]}": {demand}
        for name, (build, demand) in toys.BROKEN.items()
    }
    broken = results.pop("broken/sm_90")
    assert {key: set(result.unmet) for key, result in results.items()} == expected
    assert broken.measurement is None
    (sentence,) = offline.problems([broken])
    assert sentence.startswith("broken/sm_90: does not compile: CompilationError: ")
    (place,) = results["narrow-row/sm_90"].measurement.narrow_addresses
    assert place.startswith("toy_kernels.py:")
    assert results["tma-matmul/sm_90"].measurement.k_step > 50


def test_every_demand_has_a_toy_that_breaks_it() -> None:
    assert {demand for _, demand in toys.BROKEN.values()} == demands.DEMANDS.keys()


def test_a_demand_of_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    build = replace(toys.good()[0], demands=frozenset({"fast"}))
    monkeypatch.setattr(toys, "builds", lambda: [build])
    sentence = r"expected some of \[.*'vector_16_bytes'.*\], got \['fast'\] in the build 'copy'"
    with pytest.raises(ValueError, match=sentence):
        offline.builds(["toy_kernels"])


def test_two_builds_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = toys.good()[:2]
    monkeypatch.setattr(toys, "builds", lambda: [first, replace(second, name=first.name)])
    with pytest.raises(ValueError, match=r"expected different names, got 'copy' twice"):
        offline.builds(["toy_kernels"])


def test_the_process_that_compiles_fails_with_its_own_words() -> None:
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        offline.run(["no_such_module"])


WORSE = {
    "registers": {"registers": 46},
    "instructions": {"instructions": 421},
    "k_step": {"k_step": 106},
    "ldmatrix": {"ldmatrix": 5},
    "spilled": {"spilled": 4},
    "shared": {"shared": 1040},
    "serialised": {"serialised": "its registers"},
    "matrix": {"matrix": "HMMA", "from_shared": 0},
    "from registers": {"from_shared": 3},
    "narrow loads": {"loads_16": 48},
    "narrow stores": {"stores": 40},
    "no tma loads": {"tma_loads": 0},
    "no tma stores": {"tma_stores": 0},
}


@pytest.mark.parametrize("change", WORSE.values(), ids=WORSE)
def test_what_became_worse_fails_with_the_way_to_accept_it(change: dict[str, Any]) -> None:
    old, new = (offline_table.row(m) for m in (PLAIN, replace(PLAIN, **change)))
    (sentence,) = offline_table.worse("toy/sm_90", new, old)
    assert sentence.startswith("toy/sm_90: ")
    assert sentence.endswith(
        "if it is meant, run `python -m resunet_fast.testing.offline --update` and say why"
    )


@pytest.mark.parametrize(
    "change",
    [{}, {"registers": 44}, {"instructions": 420}, {"k_step": 90, "instructions": 300}],
    ids=["the same", "few registers", "few instructions", "better"],
)
def test_what_is_no_worse_passes(change: dict[str, Any]) -> None:
    old, new = (offline_table.row(m) for m in (PLAIN, replace(PLAIN, **change)))
    assert offline_table.worse("toy/sm_90", new, old) == []


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """What the next run of the command line finds; nothing is compiled."""
    found = [Result("toy", 90, "toys.toy_kernel", PLAIN, {})]
    monkeypatch.setattr(offline, "run", lambda *_: found)
    return found


def test_the_command_updates_and_compares(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "new" / "table.json"
    arguments = ["--table", str(table)]
    assert offline.main(arguments) == 1
    assert "expected the committed table, there is none" in capsys.readouterr().out
    assert offline.main([*arguments, "--update"]) == 0
    assert offline.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "4 HGMMA, 4 shared" in printed
    assert "1 builds: OK" in printed
    results[:] = [replace(results[0], measurement=replace(PLAIN, spilled=8))]
    assert offline.main(arguments) == 1
    assert "toy/sm_90: spilled rose from 0 to 8" in capsys.readouterr().out
    results[:] = [replace(results[0], name="other")]
    assert offline.main(arguments) == 1
    assert f"other/sm_90: it is not in {table}" in capsys.readouterr().out


def test_an_update_of_a_part_keeps_the_rest(results: list[Result], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    arguments = ["--table", str(table), "--update"]
    offline.main(arguments)
    results[:] = [replace(results[0], name="other")]
    offline.main([*arguments, "--arch", "90"])
    assert offline_table.load(table)[1].keys() == {"toy/sm_90", "other/sm_90"}
    offline.main(arguments)
    assert offline_table.load(table)[1].keys() == {"other/sm_90"}


def test_a_table_of_another_triton(results: list[Result], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    offline_table.save(table, "2.0.0", {"toy/sm_90": offline_table.row(PLAIN)})
    (sentence,) = offline.compare(results, table)
    assert "got that of 2.0.0" in sentence


def test_the_command_writes_json(results: list[Result], tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    offline.main(["--table", str(tmp_path / "table.json"), "--update", "--json", str(output)])
    assert json.loads(output.read_text())[0]["measurement"]["registers"] == 40


def jitted() -> dict[str, list[str]]:
    """Every function of the package that Triton compiles: its decorators as written."""
    root = Path(resunet_fast.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("triton." in decorator for decorator in decorators):
                    found[f"{module}.{node.name}"] = decorators
    return found


def kernels() -> set[str]:
    return {name for name in jitted() if name.endswith("_kernel")}


def test_no_kernel_tunes_itself() -> None:
    # It does not run in the interpreter, and it chooses by timing.
    for name, decorators in jitted().items():
        assert decorators == ["triton.jit"], name


def test_every_kernel_is_compiled() -> None:
    built = {offline.qualified(build) for build in offline.builds(offline.kernel_modules())}
    assert built == kernels()


def test_the_table_has_every_build_and_no_other() -> None:
    names = {
        f"{build.name}/sm_{arch}"
        for build in offline.builds(offline.kernel_modules())
        for arch in build.architectures
    }
    assert offline_table.load(TABLE)[1].keys() == names


def test_the_first_build_of_every_kernel_for_hopper() -> None:
    results = offline.run(architectures=(90,), main_only=True)
    assert offline.problems(results) + offline.compare(results, TABLE) == []
    assert {result.kernel for result in results} == kernels()


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_build(arch: int) -> None:
    results = offline.run(architectures=(arch,))
    assert offline.problems(results) + offline.compare(results, TABLE) == []
