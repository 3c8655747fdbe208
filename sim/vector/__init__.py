"""The JAX engine: the rules of `docs/simulation.md` for thousands of clusters at once.

Pure functions over arrays; one compiled program plays a batch of clusters. Undisturbed decode
steps of a device are leapt over (rule 14), those of several replicas that take turns too.
`sim.vector.simulate` plays one workload, `sim.vector.engine` a batch.
"""
