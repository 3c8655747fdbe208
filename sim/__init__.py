"""What the serving system does.

A fixed set of devices hosts replicas of models of several sizes; requests arrive, a policy
routes each to a replica or sheds it, and replicas run iteration-level continuous batching on
calibrated step times. `sim.cluster` is the SimPy reference engine; the rules it obeys are in
`docs/simulation.md`. This package imports nothing else of the project.
"""
