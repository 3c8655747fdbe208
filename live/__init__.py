"""The same decisions on real workers: model workers, a gateway and their validation.

`serve` starts the workers of a deployment and an OpenAI-compatible gateway in front of them;
`validate` plays one workload in the simulator and on real workers. A request walks from `http`
(the protocol) to the `Dispatcher`, which asks the `Decider` for a replica by what the `Ledger`
knows, and hands a `Job` to the replica's `Backend`, which reports what becomes of it as `Events`.
"""
