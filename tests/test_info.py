from __future__ import annotations

import json

import pytest

from resunet_fast import info, native, registry


def test_info_names_every_operator_and_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    for name, operator in registry.OPERATORS.items():
        assert f"  {name}\n" in printed
        for implementation in operator.implementations:
            assert f"    {implementation}: " in printed


def test_info_as_json_says_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["operators"]) == set(registry.OPERATORS)
    assert facts["machine"]["cpu"]
    assert facts["native"]["reasons"] or facts["build"]["cpu"]["built"]
    assert facts["backends"]["reference"] == []


def test_info_prints_refusals_when_the_library_is_missing() -> None:
    facts = info.collect()
    facts["native"] = {"reasons": ["it was never built"], "isa": None}
    facts["operators"] = {"bn_act": {"cpu": ["it was never built"], "reference": []}}
    printed = info.text(facts)
    assert "not loaded: it was never built" in printed
    assert "cpu: refuses: it was never built" in printed


def test_info_says_where_no_call_passes_the_dispatcher_by(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = info.collect()
    if facts["native"]["reasons"]:
        assert not facts["native"]["direct"]
        return
    assert facts["native"]["direct"]
    assert "every call takes the dispatcher" not in info.text(facts)
    monkeypatch.setattr(native, "cpu_calls", lambda: None)
    assert "every call takes the dispatcher" in info.text(info.collect())
