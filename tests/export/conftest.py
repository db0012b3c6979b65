"""No measurements: what these tests look at is what is written, not how fast it is."""

import pytest

from riformer.export import artifact, int8


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(artifact, "_rates_by_form", lambda *arguments: {})
    for module in (artifact, int8):
        monkeypatch.setattr(module, "ROUNDS", 3)
        monkeypatch.setattr(module, "SECONDS", 0.002)
