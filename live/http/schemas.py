"""What clients send, as it is checked and described, and what they get, as it is described."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from live.deployment import ROUTER

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Stop = Annotated[str, Field(min_length=1)]


class _Sent(BaseModel):
    """What a client sends: types are not converted, and what is not known here is left alone."""

    model_config = ConfigDict(strict=True, frozen=True)


class StreamOptions(_Sent):
    """How a stream is sent."""

    include_usage: bool | None = Field(
        default=None, description="Whether the last piece tells how many tokens there were."
    )


class Body(_Sent):
    """What requests of both kinds have."""

    model: str = Field(description=f"`{ROUTER}`: the router chooses. Another pins the request.")
    stream: bool | None = Field(default=None, description="Whether the answer is sent in pieces.")
    stream_options: StreamOptions | None = Field(
        default=None, description="Of no effect without `stream`."
    )
    max_tokens: Count | None = Field(default=None, description="At most so many are answered.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        default=None, description="Texts that end the answer, which does not contain them."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Whether the answer goes on where the model would end it."
    )
    forced_output_tokens: Count | None = Field(
        default=None,
        description="Exactly so many, for measurements; only where the deployment allows it.",
    )


class Part(_Sent):
    """A part of a message; of ours only `text` is understood."""

    type: str
    text: str | None = None


class Message(_Sent):
    """One message of a conversation."""

    role: str = Field(min_length=1)
    content: str | list[Part] | None = None


class ChatBody(Body):
    """The body of a chat completion."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = Field(
        default=None, description="The newer name of `max_tokens`; only one of them may be given."
    )


class CompletionBody(Body):
    """The body of a completion."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=1)
        ]
    ) = Field(description="One text, or one list of token ids.", union_mode="left_to_right")

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, prompt: object) -> object:
        if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list):
            raise ValueError("one prompt a request; send a request for each")
        return prompt


class Error(BaseModel):
    """Why there is no answer."""

    message: str = Field(description="For people.")
    type: str
    param: str | None = Field(description="The field or header at fault.")
    code: str = Field(description="For programs.")


class ErrorBody(BaseModel):
    """Every refusal."""

    error: Error


class Usage(BaseModel):
    """How many tokens there were."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatChoice(BaseModel):
    """An answer; of a server by URL there may be several."""

    index: int
    message: dict[str, JsonValue]
    finish_reason: str | None


class CompletionChoice(BaseModel):
    """An answer; of a server by URL there may be several."""

    index: int
    text: str
    finish_reason: str | None


class _Answered(BaseModel):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="The model that answered.")
    system_fingerprint: str
    usage: Usage


class ChatCompletion(_Answered):
    """A whole answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(_Answered):
    """A whole answer."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    """A model that a request may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Tokens of a prompt and its answer together.")


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """The gateway runs."""

    status: Literal["ok"]


class Replica(BaseModel):
    """A replica, as the gateway sees it."""

    alive: bool
    running: int = Field(description="Requests in its batch.")
    waiting: int = Field(description="Requests in its queue.")


class Readiness(BaseModel):
    """Whether some replica is alive."""

    ready: bool
    replicas: dict[str, Replica]


class Reloaded(BaseModel):
    """The deployment was read anew."""

    status: Literal["reloaded"]
