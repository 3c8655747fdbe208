"""The JAX engine: the rules of `docs/simulation.md` for thousands of clusters at once.

Pure functions over one cluster; the caller vmaps. Undisturbed decode steps of a device are leapt
over (rule 14), those of several replicas that take turns too. `sim.vector.engine` is the way in.
"""
