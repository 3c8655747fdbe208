"""Bundles of several servers become one that a cluster of them can be built on."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from calibrate.join import join
from sim.config import ConfigError
from sim.deploy import ClusterSpec, build_cluster
from sim.profile import Bundle, load_bundle, save_bundle

WHOLE = load_bundle("pkg://calibrate.profiles/cpu-epyc-1-thread")
TASKS = ("piqa", "hellaswag")


def server(model: str, kv_tokens: int, tasks: tuple[str, ...] = TASKS) -> Bundle:
    """As `calibrate.run url=` makes one: memory in KV tokens."""
    meta = WHOLE.meta.model_copy(
        update={
            "kind": "black-box", "models": (model,), "device": f"{model}:8000",
            "memory_bytes": -(-(kv_tokens + 1) * 10 // 9), "attachments": {}, "settings": {},
        }
    )  # fmt: skip
    profile = WHOLE.models[model].model_copy(update={"weights_bytes": 1, "kv_bytes_per_token": 1})
    quality = {t: WHOLE.quality[t].of({model: model}) for t in tasks}
    return Bundle(meta, {model: profile}, quality).attached({f"{model}/fit.json": b"{}"})


def test_each_server_keeps_its_steps_and_its_capacity() -> None:
    small, large = server("opt-1m", 40_000), server("opt-23m", 9_000)
    both = join([small, large], "a command")
    spec = ClusterSpec(
        profile="both", devices=2, models=("opt-1m", "opt-23m"),
        placement=(("opt-1m",), ("opt-23m",)), max_batch=8, token_budget=256,
    )  # fmt: skip
    cluster = build_cluster(spec, both, TASKS)
    assert cluster.kv_blocks * 16 == pytest.approx([40_000, 9_000], rel=2e-3)
    for number, alone in enumerate((small, large)):
        assert both.models[cluster.models[number]].step_time == next(
            profile.step_time for profile in alone.models.values()
        )
    assert set(both.attachments) == {"opt-1m/fit.json", "opt-23m/fit.json"}


def test_tasks_are_those_that_all_know() -> None:
    both = join([server("opt-1m", 99), server("opt-5m", 99, ("piqa",))], "a command")
    assert list(both.quality) == ["piqa"]
    assert both.quality["piqa"].values.keys() == {"opt-1m", "opt-5m"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (server("opt-1m", 50), "'opt-1m': must have different models"),
        (WHOLE, "must be of one kind"),
        (replace(server("opt-5m", 50), quality={}), "must have a common task"),
    ],
)
def test_bundles_that_do_not_go_together_are_refused(other: Bundle, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        join([server("opt-1m", 50), other], "a command")


def test_the_command_writes_a_bundle_that_loads(tmp_path: Path) -> None:
    for model in ("opt-1m", "opt-23m"):
        save_bundle(server(model, 5000), tmp_path / model)
    command = [
        sys.executable, "-m", "calibrate.join", "bundles=[opt-1m,opt-23m]", "out=both",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_bundle(str(tmp_path / "both")).meta.models == ("opt-1m", "opt-23m")
    command[-2] = "bundles=[opt-1m,nowhere]"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
