"""The OpenAPI document is true: what is drawn from it, good and bad, is answered as it says."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.live.fake_backend import Plan
from tests.live.front import Front, serving

KEY = "sk-documented"
EXCLUDED = "positive_data_acceptance"  # how much a context holds is nothing that a schema can say
# A deadline may pass (504). A header that the document does not know is no fault; of numbers
# beside it, which it draws as texts, the tool thinks so.
SETTINGS = """
[generation]
allow-extra-parameters = false
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", "504"]
"""
COMMAND = (
    "--phases examples,coverage,fuzzing --max-examples 20 --generation-deterministic --checks all "
    f"--exclude-checks {EXCLUDED} --suppress-health-check all --continue-on-failure --no-color"
)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    late = Plan(first_s=0.001)  # for the tightest deadlines
    with serving({"a": late, "b": late}, keys=(KEY,), admin_keys=(KEY,)) as front:
        yield front


@pytest.mark.slow
def test_every_operation_does_what_the_document_says(front: Front, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{front.url}/openapi.json",
         "--header", f"Authorization: Bearer {KEY}", *COMMAND.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "8 selected / 8 total" in run.stdout
    answered = {call.end.__class__.__name__ for call in front.notes.ended_calls}
    assert answered == {"End", "RefusalError"}  # requests got as far as an answer, or were late
    assert front.jobs == 0


def test_the_document_is_that_of_the_models_and_tasks_of_now(front: Front) -> None:
    before = front.gateway.terms
    front.gateway.terms = replace(before, models=("m0",), tasks=("chat", "poetry"))
    try:
        components = front.get("/openapi.json").json()["components"]
    finally:
        front.gateway.terms = before
    model = components["schemas"]["ChatBody"]["properties"]["model"]
    assert model["enum"] == ["best-effort", "m0"]
    assert components["parameters"]["x-task"]["schema"]["enum"] == ["chat", "poetry"]


def test_keys_are_documented_only_where_they_are_needed(front: Front) -> None:
    paths = front.get("/openapi.json").json()["paths"]
    locked = {path for path, of in paths.items() if "security" in next(iter(of.values()))}
    assert paths.keys() - locked == {"/health", "/ready"}
    with serving() as unlocked:
        paths = unlocked.get("/openapi.json").json()["paths"]
        assert not any("security" in next(iter(of.values())) for of in paths.values())
        assert "/admin/reload" not in paths
