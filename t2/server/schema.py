"""Requests as OpenAI's API has them. Fields that it has and this server does not are errors unless they say nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2.generation.sampling import Sampling
from t2.server.errors import ApiError

MOST_STOPS = 16
MOST_CHOICES = 128
Id = Annotated[int, Field(ge=0)]
NoPenalty = Annotated[float, Field(ge=0, le=0, strict=False)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=512)
    temperature: float = Field(1.0, ge=0, le=2, strict=False)
    top_p: float = Field(1.0, gt=0, le=1, strict=False)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _stops(self) -> Body:
        if len(self.stops) > MOST_STOPS or not all(0 < len(stop) <= 256 for stop in self.stops):
            raise ValueError(f"stop: expected at most {MOST_STOPS} strings of 1 to 256 characters")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, choice: int) -> Sampling:
        """Of one of `n` answers."""
        seed = None if self.seed is None else (self.seed + choice) % 2**64
        return Sampling(self.temperature, self.top_p, seed)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """/v1/completions."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"] = "text"


class ChatBody(Body):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _likeliest(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs true beside it")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


B = TypeVar("B", bound=BaseModel)


def parsed(kind: type[B], body: bytes) -> B:
    """The body as a request; ApiError names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}" if where else message, where) from error
