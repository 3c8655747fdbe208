"""Two bundles of the same models beside each other: what both say of steps that both cover."""

from collections.abc import Iterator
from itertools import product

import numpy as np
from jaxtyping import Float64
from rich.table import Table

from sim.config import ConfigError
from sim.envelope import ranges
from sim.profile import Bundle, ModelProfile, step_seconds

DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # of each decoding request
PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SHAPES = {  # decodes, context of each, tokens of a prompt
    "decodes alone": [(*decodes, 0) for decodes in product(DECODES, CONTEXTS)],
    "a prompt alone": [(0, 0, prompt) for prompt in PROMPTS],
    "decodes and a prompt": list(product(DECODES, CONTEXTS, PROMPTS)),
}


def comparison(bundle: Bundle, other: Bundle) -> Table:
    """How a bundle's step times differ from another's, by model and kind of step.

    Raises:
        ConfigError: if the other has none of the models.
    """
    common = [model for model in bundle.models if model in other.models]
    if not common:
        raise ConfigError(
            "beside", ", ".join(other.models), f"must have one of {', '.join(bundle.models)}"
        )
    table = Table(
        title=f"Step times, against those of {other.meta.device} ({other.meta.kind})",
        title_justify="left",
    )
    for column in ("model", "steps", "median", "least", "most", "compared"):
        table.add_column(column, justify="left" if column in ("model", "steps") else "right")
    for model in common:
        for kind, differences in _differences(bundle.models[model], other.models[model]):
            of_kind = (np.median(differences), differences.min(), differences.max())
            table.add_row(model, kind, *(f"{d:+.1%}" for d in of_kind), str(len(differences)))
    return table


def _differences(
    own: ModelProfile, other: ModelProfile
) -> Iterator[tuple[str, Float64[np.ndarray, " N"]]]:
    """Own / other − 1 for the steps of each kind that both envelopes hold, where there are any."""
    limits = np.stack([ranges(own.envelope), ranges(other.envelope)])
    low, high = limits[..., 0].max(axis=0), limits[..., 1].min(axis=0)
    for kind, shapes in SHAPES.items():
        found = []
        for decodes, context, prompt in shapes:
            counts = (
                decodes + prompt, decodes + bool(prompt), prompt * (prompt + 1) // 2,
                decodes * context,
            )  # fmt: skip
            if all(low <= counts) and all(counts <= high):
                seconds = [step_seconds(each.step_time, *counts) for each in (own, other)]
                found.append(seconds[0] / seconds[1] - 1)
        if found:
            yield kind, np.array(found)
