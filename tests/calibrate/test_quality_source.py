"""Whose quality models take whose times alone were measured."""

import json
from pathlib import Path

import pytest

from calibrate.quality_source import QualitySource, assigned_quality
from sim.config import ConfigError
from sim.profile import load_bundle

BUNDLE = "pkg://calibrate.profiles/a100-80gb-analytic"


def test_a_table_alone_serves_as_well_as_that_of_a_bundle(tmp_path: Path) -> None:
    table = load_bundle(BUNDLE).quality
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({task: q.model_dump(mode="json") for task, q in table.items()}))
    found = [
        assigned_quality(QualitySource(bundle=of, models=("opt-125m", "opt-6.7b")), ("a", "b"))
        for of in (BUNDLE, str(file))
    ]
    assert found[0] == found[1]
    assert found[0]["piqa"].values["b"] == table["piqa"].values["opt-6.7b"]


def test_a_table_without_a_model_is_refused_by_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({"sort": {"metric": "m", "source": "s", "values": {"tiny": 0.5}}}))
    with pytest.raises(ConfigError, match=r"quality.models = 'other': .* has: tiny"):
        assigned_quality(QualitySource(bundle=str(file), models=("other",)), ("a",))
    with pytest.raises(ConfigError, match="nowhere"):
        assigned_quality(QualitySource(bundle="nowhere.json", models=("tiny",)), ("a",))
