"""Bodies of requests. A field that the server cannot obey is an error, unless it asks for what happens anyway."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from idavlm.inference.generation_options import GenerationOptions
from idavlm.inference.server.errors import ApiError

# Fields of the OpenAI interface that have no effect on the answer.
_WITHOUT_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls"}
# Values that ask for what happens anyway.
_NEUTRAL: tuple[Any, ...] = (None, False, 0, [], {}, "none", {"type": "text"}, ["text"])


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: StrictBool = False


class ChatRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``.

    ``bank`` and ``workflow`` are additions to the OpenAI interface, and so are content parts
    ``{"type": "identity", "name": ..., "images": [...]}`` and ``{"type": "image", "image": ...}`` of user messages.
    """

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StrictStr | list[StrictStr] | None = None
    n: StrictInt | None = None
    bank: StrictStr | None = None
    workflow: StrictStr | None = None

    def check_effects(self) -> None:
        """Raise :class:`ApiError` for a field that would have no effect."""
        for name, value in (self.model_extra or {}).items():
            if name not in _WITHOUT_EFFECT and value not in _NEUTRAL:
                raise ApiError(400, f"{name} is not supported; leave it out.", code="unsupported_parameter", param=name)
        if self.n not in (None, 1):
            raise ApiError(
                400, f"n={self.n} is not supported; send {self.n} requests.", code="unsupported_parameter", param="n"
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options need stream=true.", code="unsupported_parameter", param="stream_options"
            )

    def options(self, *, default_new_tokens: int, max_new_tokens: int) -> GenerationOptions:
        """How the answer is generated: greedily, unless the request says otherwise."""
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if asked is not None and asked > max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens={asked} is more than the {max_new_tokens} that this server allows.",
                code="invalid_value",
                param="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            )
        given = {
            name: getattr(self, name) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")
        }
        return GenerationOptions(
            max_new_tokens=min(default_new_tokens, max_new_tokens) if asked is None else asked,
            **{name: value for name, value in given.items() if value is not None},
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            workflow=self.workflow,
        )

    def developer_as_system(self) -> list[dict[str, Any]]:
        """The messages; OpenAI's role ``developer`` is a system message, and calls of tools are refused."""
        messages = []
        for number, message in enumerate(self.messages):
            for name in ("tool_calls", "function_call", "audio"):
                if message.get(name):
                    param = f"messages[{number}].{name}"
                    raise ApiError(400, f"{param} is not supported.", code="unsupported_parameter", param=param)
            is_developer = message.get("role") == "developer"
            messages.append({**message, "role": "system"} if is_developer else message)
        return messages


class BankIdentity(BaseModel):
    """An identity of a bank: its name and its photos, as data URLs or paths below the image root."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    images: list[StrictStr] = Field(min_length=1)


class BankRequest(BaseModel):
    """Body of ``POST /v1/identities``. With ``store``, the bank is also written to disk."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    identities: list[BankIdentity] = Field(min_length=1)
    store: StrictBool = False
