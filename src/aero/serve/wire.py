"""OpenAI's wire format: what requests may say, and what answers, their pieces and errors look like."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from aero.errors import AeroError
from aero.serve.answer import Cost
from aero.serve.settings import complaint


class RequestError(AeroError):
    """An error with the status and the code that OpenAI's clients know."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON that goes with the status."""
        kind = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
        error = {"message": str(self), "type": kind.get(self.status, "server_error")}
        return {"error": {**error, "param": self.param, "code": self.code}}


class _Loose(BaseModel):
    # Existing tools send more than this; what would change the answer and is not done here is refused below.
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Loose):
    """include_usage: count tokens in a last piece."""

    include_usage: bool = False


class _Asked(_Loose):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Asked):
    """Of ``/v1/completions``. prompt: text, or tokens."""

    prompt: str | list[Annotated[int, Field(ge=0)]] | Annotated[list[str], Field(min_length=1, max_length=1)]


class TextPart(_Loose):
    """A message may come in parts; only text is read here."""

    type: Literal["text"]
    text: str


class ChatMessage(_Loose):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Role and text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(_Asked):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


_COMPLETION: TypeAdapter[CompletionRequest] = TypeAdapter(CompletionRequest)
_CHAT: TypeAdapter[ChatRequest] = TypeAdapter(ChatRequest)

_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""Settings that would change the answer and are not done here, with the values that ask for nothing."""


def parse(data: bytes, *, chat: bool) -> CompletionRequest | ChatRequest:
    """A request from its body. Raises RequestError that names the setting, never its value."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestError("The request is not JSON.") from None
    if not isinstance(values, dict):
        raise RequestError("The request is not a JSON object.")
    for name, harmless in _ONLY.items():
        if values.get(name) is not None and values[name] not in harmless:
            raise RequestError(f"{name} is not supported here; leave it out.", param=name, code="unsupported_parameter")
    try:
        return (_CHAT if chat else _COMPLETION).validate_python(values)
    except ValidationError as error:
        place = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
        raise RequestError(f"{complaint(error)}.", param=str(place[0]) if place else None) from None


def whole(
    identity: str, model: str, created: int, text: str, ended: str, prompt_tokens: int, cost: Cost, *, chat: bool
) -> dict[str, Any]:
    """A complete answer."""
    body: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    )
    return {
        "id": identity,
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, **body, "logprobs": None, "finish_reason": ended}],
        "usage": usage(prompt_tokens, cost),
        "aero": asdict(cost),
    }


def piece(
    identity: str, model: str, created: int, text: str | None, ended: str | None, cost: Cost, *, chat: bool, first: bool
) -> bytes:
    """One server-sent event of a streamed answer; text None: nothing new but its end."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": ended}
    if chat:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        choice["delta"] = delta if text is None else {**delta, "content": text}
    else:
        choice["text"] = text or ""
    document = {
        "id": identity,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "aero": asdict(cost),
    }
    return event(document)


def counted(identity: str, model: str, created: int, prompt_tokens: int, cost: Cost, *, chat: bool) -> bytes:
    """The last piece, if usage is asked for."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = {"id": identity, "object": kind, "created": created, "model": model, "choices": []}
    return event({**head, "usage": usage(prompt_tokens, cost), "aero": asdict(cost)})


def usage(prompt_tokens: int, cost: Cost) -> dict[str, int]:
    """Tokens in and out."""
    total = prompt_tokens + cost.tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": cost.tokens, "total_tokens": total}


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(document)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
