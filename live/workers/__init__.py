"""Workers of ours: a process for each device, in which engines take turns, and the way to it.

`Workers` (`backend`) is the gateway's end: it starts a worker (`launch`, or `actors` on a Ray
cluster), sends and hears `messages` over a `link`, and makes text of tokens (`tokenizer`,
`answer`). In the worker, `process` is where it begins and `loop` what it does.
"""
