"""What a gateway and a worker tell each other: MessagePack of these structures, and nothing else.

Each message is one `send_bytes` of a `multiprocessing.connection`, over a pipe or TCP. Decoding
checks every field; a message that is no such structure is refused. Structures are arrays, not maps:
one of them is sent for each step.
"""

import msgspec


class Submit(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Queue a job at an engine."""

    job: int
    engine: int
    sent_s: float  # on the gateway's clock, whatever it counts from
    prompt: list[int]
    max_tokens: int
    stop_tokens: list[int]  # any of them ends the answer
    first_within_s: float | None  # without a first token within that, counted from `sent_s`
    finish_within_s: float | None  # without a last token within that


class Cancel(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Let jobs go."""

    jobs: list[int]


class Stop(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Take no more jobs, finish those inside within that time, and end."""

    drain_s: float


class ServedModel(msgspec.Struct, frozen=True):
    """What an engine of the worker is."""

    name: str
    max_context: int
    vocab_size: int
    kv_tokens: int  # capacity
    block_tokens: int
    max_batch: int
    token_budget: int
    load_s: float


class Ready(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """All models are loaded; engines are numbered in this order."""

    models: list[ServedModel]
    device: str
    pid: int
    threads: int
    cores: int


class Formed(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """A step is formed, and about to be computed; sent only if it moved a job.

    Those that left did so before it took jobs off the queue.
    """

    engine: int
    expired: list[int]  # their life is over
    reset: list[int]  # lost their cache, and wait again
    admitted: list[int]
    blocks_used: int


class Ended(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """A step took effect, or jobs were cancelled between steps."""

    engine: int
    chunks: list[tuple[int, int]]  # job, prompt tokens computed
    emitted: list[tuple[int, int]]  # job, token id
    finished: list[int]
    cancelled: list[int]
    blocks_used: int
    step_s: float | None


class Refused(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """A job that no worker like this can serve."""

    job: int
    message: str


class Failed(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """A job that another worker may serve."""

    job: int
    reason: str


class Draining(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """No more jobs, please: the worker was told to end."""

    reason: str


class Broken(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """The worker ends here."""

    reason: str
    refused: bool  # its settings are: another one would end the same way


ToWorker = Submit | Cancel | Stop
ToGateway = Ready | Formed | Ended | Refused | Failed | Draining | Broken

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_gateway = msgspec.msgpack.Decoder(ToGateway).decode
