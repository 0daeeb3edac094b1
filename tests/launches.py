"""Which Triton kernels a call launches."""

from __future__ import annotations

from typing import Any

import pytest


class Spy:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launches: list[str]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches.append(self.name)
        return self.kernel[grid]


def spy(
    monkeypatch: pytest.MonkeyPatch, module: Any, kernels: dict[str, str], seen: list[str]
) -> None:
    """Note in `seen` the launches of a module's kernels, by the names that `kernels` gives."""
    for attribute, name in kernels.items():
        monkeypatch.setattr(module, attribute, Spy(getattr(module, attribute), name, seen))
