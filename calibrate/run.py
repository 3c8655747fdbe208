"""The command `python -m calibrate.run`: time steps, fit, and write a bundle.

The models of this machine's device are timed on a real engine (`calibrate.white_box`); with `url=`
a server is, from outside (`calibrate.black_box`), for which PyTorch is not needed.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from calibrate.beside import comparison
from sim import command
from sim.config import ConfigError
from sim.profile import load_bundle, save_bundle

OUTSIDE = ("url", "black_box")  # settings that a calibration from outside alone has
INSIDE = ("device", "models", "threads", "cores", "engine", "memory_utilization", "grid", "repeat")


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="calibrate")
def main(config: DictConfig) -> None:
    """Time, fit, write and show."""
    console = Console()
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    try:
        other = None if (path := values.pop("beside")) is None else load_bundle(str(path))
        if values["url"] is None:
            from calibrate.white_box import calibrate, show
        else:
            from calibrate.black_box.calibration import calibrate, show
        out = Path(str(values["out"]))
        foreign = OUTSIDE if values["url"] is None else INSIDE
        settings = {key: value for key, value in values.items() if key not in foreign}
        bundle = calibrate(settings, console, command.line("calibrate.run"))
        save_bundle(bundle, out)
        show(bundle, out, console)
        if other is not None:
            console.print(comparison(bundle, other))
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    console.print(f"wrote {out}: {bundle.content_hash[:12]}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
