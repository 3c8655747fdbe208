"""Settings of a replica that is a server by URL."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from sim.config import Spec

Positive = Annotated[float, Field(gt=0)]


class TimeoutsSpec(Spec):
    """How long a server may say nothing."""

    connect_s: Positive = 2.0
    first_byte_s: Positive = 120.0  # of an answer's stream
    between_s: Positive = 30.0  # two pieces of a stream


class BreakerSpec(Spec):
    """When a server gets no more jobs, and how often it is asked whether it is back."""

    failures: int = Field(default=3, ge=1)  # in a row
    first_probe_s: Positive = 0.5  # after the last failure; twice as long after each in vain
    longest_probe_s: Positive = 30.0  # between two probes, at most
    answer_s: Positive = 5.0  # that a server has to answer a probe

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.longest_probe_s < self.first_probe_s:
            raise ValueError("longest_probe_s must be at least first_probe_s")
        return self


class ServerSpec(Spec):
    """An OpenAI-compatible server that is a replica."""

    kind: Literal["server"] = "server"
    name: str = Field(min_length=1)
    url: str  # with or without /v1
    model: str  # as the cluster calls it
    served_model: str | None = None  # as the server calls it; null: the only one that it lists
    api_key_env: str | None = None  # the environment variable that holds the server's key
    timeouts: TimeoutsSpec = TimeoutsSpec()
    breaker: BreakerSpec = BreakerSpec()
    scrape_s: Positive | None = None  # between two looks at its metrics; null: none
    continuous_usage: bool = True  # ask for counts in every piece; false where that is refused

    @field_validator("url")
    @classmethod
    def _base(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise ValueError("a key goes into api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError("must be http(s)://host:port of a server")
        return url.rstrip("/").removesuffix("/v1")
