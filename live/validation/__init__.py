"""How well the simulator foretells what real workers do: one workload on both, beside each other.

`play` sends a drawn workload to real workers in real time, through the gateway's own core;
`comparison` sets what became of it beside what the simulator says: whether it ranks the policies
alike, and how far its latencies are off. `python -m live.validate` is the command.
"""
