"""A refused setting is explained by its key, its value and what is allowed."""

import pickle
from typing import Annotated, Literal

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pydantic import Field

from sim.config import ConfigError, Spec, SpecError, check
from sim.utility import UtilitySpec


class Engine(Spec):
    kind: Literal["steam"] = "steam"
    boilers: int = Field(default=1, ge=1)


class Sail(Spec):
    kind: Literal["sail"] = "sail"
    masts: int = Field(default=1, ge=1)


class Ship(Spec):
    length_m: float = Field(gt=0)
    drive: Annotated[Engine | Sail, Field(discriminator="kind")] = Engine()
    boats: dict[str, Sail] = Field(default_factory=dict)


def refusal(values: object) -> str:
    with pytest.raises(ConfigError) as refused:
        check(Ship, values, "ship")
    return str(refused.value)


def test_valid_settings_are_built() -> None:
    ship = check(Ship, {"length_m": 30, "drive": {"kind": "sail", "masts": 3}}, "ship")
    assert ship == Ship(length_m=30.0, drive=Sail(masts=3))


def test_a_value_out_of_range_names_key_value_and_limit() -> None:
    message = refusal({"length_m": -2.5})
    assert message.startswith("ship.length_m = -2.5: ")
    assert "greater than 0" in message


def test_an_unknown_key_names_those_that_are_allowed() -> None:
    message = refusal({"length_m": 30, "lenght_m": 30})
    assert message == "ship.lenght_m = 30: unknown key; allowed: boats, drive, length_m"


def test_an_unknown_key_in_a_variant_names_that_variants_keys() -> None:
    message = refusal({"length_m": 30, "drive": {"kind": "sail", "boilers": 2}})
    assert message == "ship.drive.boilers = 2: unknown key; allowed: kind, masts"


def test_an_unknown_variant_names_the_variants() -> None:
    message = refusal({"length_m": 30, "drive": {"kind": "oars"}})
    assert message.startswith("ship.drive = ")
    assert "'steam'" in message
    assert "'sail'" in message


def test_a_missing_key_is_named() -> None:
    assert refusal({}) == "ship.length_m is missing"


def test_a_key_inside_a_mapping_is_named_in_full() -> None:
    message = refusal({"length_m": 30, "boats": {"gig": {"masts": 0}}})
    assert message.startswith("ship.boats.gig.masts = 0: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    assert refusal({"length_m": value}).startswith(f"ship.length_m = {value}: ")


def test_every_refused_setting_gets_a_line() -> None:
    message = refusal({"length_m": 0, "drive": {"kind": "steam", "boilers": 0}})
    assert [line.split(" = ")[0] for line in message.splitlines()] == [
        "ship.length_m",
        "ship.drive.boilers",
    ]


def test_a_config_error_says_key_value_and_allowed() -> None:
    assert str(ConfigError("rate", -1, "at least 0")) == "rate = -1: at least 0"


def test_a_refusal_reads_the_same_in_another_process() -> None:
    for error in (ConfigError("rate", -1, "at least 0"), SpecError("a is missing", "b is missing")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", ["hard", "soft", "ttft", "tpot"])
def test_every_utility_that_is_shipped_is_valid(name: str) -> None:
    with initialize_config_module("conf", version_base=None):
        values = OmegaConf.to_container(compose(f"utility/{name}").utility, resolve=True)
    assert check(UtilitySpec, values, "utility").kind == ("soft" if name == "soft" else "hard")
