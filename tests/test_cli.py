"""The command line itself: help, missing packages, interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
from children import run_python
from saved_models import model_dir as model_dir
from saved_models import run

from resunet_fast import cli


def test_no_arguments_print_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    out = capsys.readouterr().out
    assert all(name in out for name in ("info", "demo", "predict"))


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("segment")
    assert caught.value.code == 2
    assert "predict" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "predict"])
def test_commands_explain_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    assert f"python -m resunet_fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "package"), [("demo", "skimage"), ("predict", "safetensors")])
def test_a_missing_package_is_one_sentence(command: str, package: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from resunet_fast.cli import main; sys.exit(main([{command!r}, '--help']))"
    )
    result = run_python("-c", program, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert package in result.stderr
    assert 'pip install "resunet_fast[demo]"' in result.stderr


def test_a_broken_import_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cli.Command("", "resunet_fast.does_not_exist")
    monkeypatch.setitem(cli.COMMANDS, "info", broken)
    with pytest.raises(ModuleNotFoundError):
        run("info")


def test_interruption_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("resunet_fast.predict.main", interrupt)
    assert run("predict") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_module_runs(model_dir: Path, tmp_path: Path) -> None:
    arguments = ("-m", "resunet_fast", "predict", "--model", model_dir, "no.png")
    result = run_python(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
