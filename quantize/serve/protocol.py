"""The shapes of requests and answers: OpenAI's for /v1/*, our own for /chat and /v1/generate.

In: the bytes of a body. Out: a frozen request, or a Failure that names the field and never repeats its value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantize.serve.failures import Failure

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_MESSAGES = 4096
MAX_TOOLS = 128  # as OpenAI has it
MAX_INPUTS = 1 << 20  # of an embedding request: texts, or tokens of one text
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Open(BaseModel):
    """Other fields are kept: an upstream may know them, a local engine refuses them by name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class TextPart(_Open):
    """A part of a message; only `text` parts are understood by local engines."""

    type: str
    text: str | None = None


class FunctionCall(_Open):
    """Which function a model called, and with what: JSON as text, or, as some clients send it, the object itself."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(_Open):
    """One call of a tool, as an assistant's message carries it."""

    id: Annotated[str, Field(max_length=200)] = ""
    type: str = "function"
    function: FunctionCall | None = None


class Message(_Open):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=200)] | None = None


class Function(_Open):
    """What a model may call. parameters: a JSON schema of an object."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Open):
    """One entry of `tools`; local engines know those of type `function`."""

    type: str = "function"
    function: Function | None = None


class JsonSchemaFormat(_Open):
    """The schema that an answer must fit; OpenAI calls it `schema`."""

    name: str = "answer"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Open):
    """text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(_Open):
    """include_usage: one more chunk at the end, with the tokens."""

    include_usage: bool = False


class _Sampled(_Open):
    model: Annotated[str, Field(max_length=200)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    grammar: Annotated[str, Field(max_length=1 << 16)] | None = None
    user: str | None = None


class ChatRequest(_Sampled):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None


class CompletionRequest(_Sampled):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingRequest(_Open):
    """POST /v1/embeddings"""

    model: Annotated[str, Field(max_length=200)] | None = None
    input: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest


class SimpleChatRequest(_Strict):
    """POST /chat"""

    message: Annotated[str, Field(min_length=1)]
    system: str | None = None
    temperature: Temperature = 0.7
    max_tokens: Tokens = 256
    model: Annotated[str, Field(max_length=200)] | None = None


class GenerateRequest(_Strict):
    """POST /v1/generate"""

    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: Tokens = 128
    temperature: Temperature = 0.7
    top_p: TopP = 0.9
    do_sample: bool = True
    model: Annotated[str, Field(max_length=200)] | None = None


class SimpleAnswer(_Strict):
    """What /chat and /v1/generate answer. memory_rss_mb: of the gateway and the model's process, in 10^6 bytes."""

    answer: str
    model: str
    runtime: str
    latency_ms: float
    memory_rss_mb: float
    trace_id: str


class ErrorDetail(_Strict):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Strict):
    """Every error of this gateway."""

    error: ErrorDetail
    trace_id: str


class ModelCard(_Open):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Strict):
    """GET /v1/models"""

    object: Literal["list"]
    data: list[ModelCard]


class Usage(_Open):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Embeddings(_Open):
    """An answer of /v1/embeddings. `embedding` is a list of numbers, or base64 of little-endian float32."""

    object: Literal["list"]
    model: str
    data: list[dict[str, Any]]
    usage: dict[str, int]


class Completion(_Open):
    """An answer of /v1/chat/completions or /v1/completions that was not streamed."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request from the bytes of a body. Raises Failure: 400 for what is no JSON, 422 for what does not fit."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        first = exc.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid" and "recursion" in first["msg"]:
            raise Failure(400, "nested_too_deeply", "the body is nested more than 200 levels deep") from None
        if first["type"] == "json_invalid":
            raise Failure(400, "invalid_json", "the body is not valid JSON in UTF-8") from None
        where = _where(first["loc"])
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        raise Failure(422, "invalid_value", message, param=where or None) from None


def _where(location: tuple[int | str, ...]) -> str:
    """The dotted path of a field. A name that the client made up may be long, or the prompt itself: it is cut."""
    return ".".join(str(step)[:40] for step in location if isinstance(step, int) or step.isidentifier())[:120]
