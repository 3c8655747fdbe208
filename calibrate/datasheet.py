"""Peak figures of devices, from their datasheets: `datasheets.json`, and files of a user's own."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from calibrate.files import read_json
from sim.config import ConfigError, Spec, check
from sim.profile import Name

Dtype = Literal["float32", "float16", "bfloat16", "fp8"]
Rate = Annotated[float, Field(gt=0)]


class Datasheet(Spec):
    """What a device reaches at best; `flops_per_s` of dense matrix products, by dtype."""

    flops_per_s: dict[Dtype, Rate] = Field(min_length=1)
    bandwidth_bytes_per_s: Rate  # of its memory
    memory_bytes: int = Field(ge=1)
    reported: tuple[str, ...] = ()  # names that its driver reports for it
    source: str = Field(min_length=1)  # the document

    def flops_of(self, dtype: Dtype) -> float:
        """FLOP/s in `dtype`.

        Raises:
            ConfigError: if the datasheet has none.
        """
        if dtype not in self.flops_per_s:
            raise ConfigError("dtype", dtype, f"the datasheet has {', '.join(self.flops_per_s)}")
        return self.flops_per_s[dtype]


def read_datasheets(path: str | None) -> Mapping[str, Datasheet]:
    """The datasheets that are shipped, by device, and those of the file at `path`.

    Raises:
        ConfigError: if that file is not of the form of `datasheets.json`, or has a shipped device.
    """
    text = files("calibrate").joinpath("datasheets.json").read_text("utf-8")
    shipped = check(dict[Name, Datasheet], json.loads(text), "datasheets.json")
    if path is None:
        return shipped
    own = check(dict[Name, Datasheet], dict(read_json(Path(path))), path)
    for device in own:
        if device in shipped:
            raise ConfigError(path, device, "another name: datasheets.json has this one")
    return shipped | own


def datasheet_reported(name: str, datasheets: Mapping[str, Datasheet]) -> Datasheet | None:
    """The datasheet of the device that reports this name, if there is one."""
    named = (sheet for key, sheet in datasheets.items() if name in (key, *sheet.reported))
    return next(named, None)


def datasheet_of(device: str, datasheets: Mapping[str, Datasheet]) -> Datasheet:
    """The datasheet of a device.

    Raises:
        ConfigError: if it has none.
    """
    if device not in datasheets:
        raise ConfigError("device", device, f"one of {', '.join(datasheets)}")
    return datasheets[device]
