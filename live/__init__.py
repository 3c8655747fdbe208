"""The same decisions on real workers: an OpenAI-compatible gateway, and its validation.

A request walks from `http` (the protocol) to the `Dispatcher`, which asks the `Decider` for a
replica by what the `Ledger` knows, and hands a `Job` to the replica's `Backend` (`workers` of ours,
or `servers` by URL), which reports what becomes of it as `Events`; `records` remember. `serve`
starts all of it from one `deployment` document; `replay` makes logged decisions again; `models`
trains models that really differ; `validation` plays one workload in the simulator and on workers.
"""
