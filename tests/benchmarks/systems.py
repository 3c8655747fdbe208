"""The system that benchmarks run on: the default cluster and workload at a share of capacity."""

from functools import cache

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from agent.capacity import capacity_rps
from sim.config import check
from sim.deploy import build_cluster
from sim.profile import load_bundle
from sim.run import RunSpec
from sim.types import Bounds, Cluster, Workload
from sim.utility import bounds_of
from sim.workload import at_rate, generate


@cache
def spec() -> RunSpec:
    with initialize_config_module("conf", version_base="1.3"):
        return check(RunSpec, OmegaConf.to_container(compose("sim"), resolve=True), "")


@cache
def system(
    devices: int, load: float, requests: int, max_batch: int = 64
) -> tuple[Cluster, Workload, Bounds]:
    """The default cluster with this many devices, and requests at this share of its capacity.

    Capacity is what the cluster serves with requests spread over all of its replicas.
    """
    settings = spec()
    cluster_spec = settings.cluster.model_copy(update={"devices": devices, "max_batch": max_batch})
    bundle = load_bundle(cluster_spec.profile)
    cluster = build_cluster(cluster_spec, bundle, settings.tasks.names)
    context = int(cluster.max_context.min())
    backlog = generate(settings.workload, settings.tasks, 1, context)
    rate_rps = load * capacity_rps(cluster, backlog, backlog=500 * devices)
    drawn = at_rate(settings.workload, rate_rps)
    drawn = drawn.model_copy(update={"duration_s": requests / rate_rps})
    workload = generate(drawn, settings.tasks, 0, context)
    return cluster, workload, bounds_of(settings.utility, workload)
