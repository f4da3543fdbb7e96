"""The fields of a request: each is served or refused by its name, and null is its default."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from thoughtbubbles.serving.refusals import RefusedError, bad_field
from thoughtbubbles.support.errors import shown

MOST_CHOICES = 128
MOST_ALTERNATIVES = 20
MOST_STOPS = 16
STOP_CHARACTERS = 1000
COMPLETION_TOKENS = 16
"""That a completion has by default."""
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that ask for what there is not here, with the values that ask for nothing."""

Fields = TypeVar("Fields", bound="RequestFields")
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        return without_nulls(given)


class RequestFields(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    default_tokens: ClassVar[int | None] = None

    model: str | None = None
    budget: int | float | str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=0)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, float] = {}
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        """Fields that are null are left out, and those that ask for nothing of what is not served."""
        fields = without_nulls(given)
        if not isinstance(fields, dict):
            return fields
        for name, neutral in UNSERVED.items():
            if name in fields and name not in cls.model_fields:
                value = fields.pop(name)
                if value not in neutral and not (name == "best_of" and value == fields.get("n", 1)):
                    raise bad_field(name, f"{name}={shown(value)}: not served here", "unsupported_parameter")
        return fields

    @model_validator(mode="after")
    def _together(self) -> Self:
        stops = self.stops
        if len(stops) > MOST_STOPS or not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
            expected = f"at most {MOST_STOPS} strings of 1 to {STOP_CHARACTERS} characters"
            raise bad_field("stop", f"stop={shown(self.stop)}: expected {expected}")
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options", "stream_options: expected it with stream=true alone")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def tokens_asked(self) -> int | None:
        """Tokens that an answer may have; None where nothing was said."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to name with each; None asks for no log-probabilities."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionFields(RequestFields):
    """A request to go on with a text."""

    default_tokens = COMPLETION_TOKENS

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to name with each; None asks for no log-probabilities."""
        return self.logprobs


class ChatFields(RequestFields):
    """A request for the next message of a conversation."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise bad_field("max_tokens", "max_tokens and max_completion_tokens: expected one of them, or both alike")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_field("top_logprobs", "top_logprobs: expected it with logprobs=true alone")
        return self

    @property
    def tokens_asked(self) -> int | None:
        """Tokens that an answer may have; None where nothing was said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to name with each; None asks for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def without_nulls(given: Any) -> Any:
    """An object without the fields that are null; what is no object as it is."""
    return {name: value for name, value in given.items() if value is not None} if isinstance(given, Mapping) else given


def read_fields(kind: type[Fields], body: bytes) -> Fields:
    """The fields of a request.

    Raises:
        RefusedError: the body is no JSON object, or a field is unknown, not served, or has a bad value.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error.errors(include_url=False)[0]) from None


def _refused(error: Any) -> RefusedError:
    place = ".".join(str(part) for part in error["loc"] if not _is_branch(part))
    name = str(error["loc"][0]) if error["loc"] else None
    match error["type"]:
        case "json_invalid" | "json_type":
            return RefusedError(
                400, f"the body is not JSON: {error['ctx']['error'] if 'ctx' in error else error['msg']}"
            )
        case "model_type":
            return RefusedError(400, f"the body is {shown(error['input'])}: expected a JSON object")
        case "missing":
            return RefusedError(400, f"{place}: expected it, and there is none", name, "missing_required_parameter")
        case "extra_forbidden":
            return RefusedError(400, f"{place}: no field that is served here", name, "unsupported_parameter")
        case _:
            words = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            return RefusedError(400, f"{place}={shown(error['input'])}: expected {words}", name, "invalid_value")


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's place names one of several types rather than a field."""
    return part in ("str", "int", "float") or (isinstance(part, str) and "[" in part)
