"""The command that explains a learned router: `python -m agent.explain`."""

import warnings
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from agent.evaluate import origin_of
from agent.explanation.explanation import explain, write_results
from agent.explanation.report import verdict, write_report
from agent.explanation.spec import ExplainSpec
from agent.provenance import files_hash
from sim import command
from sim.config import check
from sim.policy import PolicyWarning
from sim.profile import load_bundle

INTERRUPTED = "interrupted: nothing was written"


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="explain")
def main(config: DictConfig) -> None:
    """Explain a router; end with what was found and the path of the report."""
    console = Console()
    with command.ending_with_a_reason(INTERRUPTED), warnings.catch_warnings():
        warnings.simplefilter("once", PolicyWarning)
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(ExplainSpec, values, "")
        bundle = load_bundle(spec.cluster.profile)
        explanation = explain(spec, bundle, console)
    origin = {
        "checkpoint": spec.checkpoint,
        "checkpoint hash": files_hash(spec.checkpoint, "checkpoint"),
        **origin_of(spec.cluster.profile, "agent.explain"),
    }
    folder = Path(spec.output_dir)
    write_results(folder / "results.json", spec, explanation, origin)
    page = folder / "report.html"
    write_report(page, spec, explanation, origin)
    console.print(verdict(explanation), highlight=False)
    console.print(f"[dim]{bundle.meta.kind} profile of {bundle.meta.device}[/]", highlight=False)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
