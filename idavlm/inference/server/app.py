"""The routes: the OpenAI interface for chat completions, with identities and named banks."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from idavlm.inference.bank_store import BankStore, StoredBank, TooManyBanks
from idavlm.inference.batching import BatchingEngine, Cancelled, DeadlineExceeded, EngineClosed, Generation
from idavlm.inference.identity_answer import named_boxes
from idavlm.inference.prompts import Prompt, PromptEncoder, PromptTooLong
from idavlm.inference.server.errors import ApiError
from idavlm.inference.server.gate import RELEASE_BODY, Gate, log_failure
from idavlm.inference.server.metrics import CONTENT_TYPE, Metrics
from idavlm.inference.server.request_images import Forbidden, RequestImages
from idavlm.inference.server.schema import BankRequest, ChatRequest
from idavlm.inference.server.settings import ServerSettings

_SERVER_ERROR = ApiError(500, "the server failed; see its log.", code="server_error")

_PREPARING_THREADS = 4
"""Threads that decode images and tokenize."""

_Body = TypeVar("_Body", bound=BaseModel)


def create_app(engine: BatchingEngine, banks: BankStore, settings: ServerSettings) -> Gate:
    """The ASGI application of one model. It closes the engine when it ends.

    Args:
        engine: runs the model.
        banks: the named banks.
        settings: the limits.
    """
    metrics = Metrics()
    engine.on_batch = metrics.add_batch
    metrics.watch("idavlm_requests_waiting", "Requests that wait for a batch.", lambda: engine.num_waiting)
    metrics.watch("idavlm_requests_running", "Requests without a complete response.", lambda: gate.num_requests)
    metrics.watch("idavlm_banks", "Banks.", lambda: len(banks.names()))
    pool = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="idavlm-prompt")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, 1.0)
        pool.shutdown()

    app = FastAPI(title="idavlm", lifespan=lifespan, docs_url=None, redoc_url=None)
    gate = Gate(app, settings, metrics)
    routes = _Routes(engine, banks, settings, metrics, pool)

    async def on_api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.content, error.status, error.headers)

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return await on_api_error(request, ApiError(error.status_code, str(error.detail), code="not_found"))

    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_api_error(request, _SERVER_ERROR)  # the gate logs it

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)

    def described(model: type[BaseModel]) -> dict[str, Any]:
        return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}

    async def health() -> Response:
        status = "stopping" if gate.is_stopping else "ok"
        return JSONResponse({"status": status}, 503 if gate.is_stopping else 200)

    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    app.get("/health")(health)
    app.get("/metrics")(metrics_text)
    app.get("/v1/models")(routes.list_models)
    app.get("/v1/models/{model:path}")(routes.get_model)
    app.post("/v1/chat/completions", openapi_extra=described(ChatRequest))(routes.chat)
    app.post("/v1/identities", openapi_extra=described(BankRequest), status_code=201)(routes.create_bank)
    app.get("/v1/identities")(routes.list_banks)
    app.get("/v1/identities/{name}")(routes.get_bank)
    app.delete("/v1/identities/{name}")(routes.delete_bank)
    return gate


class _Routes:
    def __init__(
        self,
        engine: BatchingEngine,
        banks: BankStore,
        settings: ServerSettings,
        metrics: Metrics,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.engine = engine
        self.banks = banks
        self.settings = settings
        self.metrics = metrics
        self.pool = pool
        self.encoder = PromptEncoder(engine.processor, max_tokens=settings.max_prompt_tokens)
        self.created = int(time.time())

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def get_model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._model()

    async def chat(self, request: Request) -> Response:
        start = time.monotonic()
        body = await _read(request, ChatRequest)
        body.check_effects()
        self._check_model(body.model)
        deadline = start + self.settings.deadline
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        with self.engine.preparing(), _as_api_errors():
            options = body.options(
                default_new_tokens=self.settings.default_new_tokens, max_new_tokens=self.settings.max_new_tokens
            )
            prompt = await loop.run_in_executor(self.pool, self._encode, body)
            del body.messages
            request.scope[RELEASE_BODY]()
            generation = self.engine.submit(
                prompt,
                options,
                deadline=deadline,
                on_text=lambda piece: _put_from_thread(loop, pieces, piece),
            )
        answer = _Answer(self, generation, pieces, start)
        if not body.stream:
            return JSONResponse(await answer.complete(request))
        includes_usage = body.stream_options is not None and body.stream_options.include_usage
        # An answer that fails before its first piece, as at an unknown image size, still gets the status of its error.
        first = await answer.next_piece(request)
        return StreamingResponse(
            answer.events(request, first, includes_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def create_bank(self, request: Request) -> dict[str, Any]:
        if not self.settings.allow_banks:
            raise ApiError(
                403, "this server stores nothing; send the photos with every request.", code="storing_disabled"
            )
        body = await _read(request, BankRequest)
        with _as_api_errors():
            stored = await asyncio.get_running_loop().run_in_executor(self.pool, self._create_bank, body)
        return _bank(stored)

    async def list_banks(self) -> dict[str, Any]:
        return {"object": "list", "data": [_bank(self.banks.get(name)) for name in self.banks.names()]}

    async def get_bank(self, name: str) -> dict[str, Any]:
        return _bank(self._bank_of(name))

    async def delete_bank(self, name: str) -> dict[str, Any]:
        self._bank_of(name)
        try:
            await asyncio.get_running_loop().run_in_executor(self.pool, self.banks.delete, name)
        except KeyError:  # another request has deleted it meanwhile
            self._bank_of(name)
        return {"id": name, "object": "identity_bank", "deleted": True}

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "idavlm",
            "workflows": list(self.engine.workflows),
        }

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; the model is {self.settings.model_name!r}.",
                code="model_not_found",
                param="model",
            )

    def _bank_of(self, name: str, param: str | None = None) -> StoredBank:
        try:
            return self.banks.get(name)
        except KeyError:
            raise ApiError(404, f"there is no bank {name[:100]!r}.", code="bank_not_found", param=param) from None

    def _images(self) -> RequestImages:
        return RequestImages(
            self.settings.image_root,
            max_images=self.settings.max_images,
            max_pixels=self.settings.max_pixels,
            max_aspect_ratio=self.settings.max_aspect_ratio,
        )

    def _encode(self, body: ChatRequest) -> Prompt:
        bank = None if body.bank is None else self._bank_of(body.bank, "bank").bank
        prompt = self.encoder.encode(body.developer_as_system(), bank=bank, loader=self._images())
        self._check_identities(len(prompt.names), "messages")
        return prompt

    def _create_bank(self, body: BankRequest) -> StoredBank:
        self._check_identities(len(body.identities), "identities")
        images, loaded = self._images(), {}
        for number, identity in enumerate(body.identities):
            if identity.name in loaded:
                raise ValueError(f"identities[{number}].name={identity.name!r} occurs twice; put its photos together.")
            loaded[identity.name] = [
                images.load(image, field=f"identities[{number}].images[{place}]")
                for place, image in enumerate(identity.images)
            ]
        return self.banks.create(body.name, loaded, keep=body.store)

    def _check_identities(self, number: int, param: str) -> None:
        if number > self.settings.max_identities:
            raise ApiError(
                400,
                f"there are {number} identities; this server allows {self.settings.max_identities}.",
                code="too_many_identities",
                param=param,
            )


class _Answer:
    """The responses that one generation becomes."""

    def __init__(self, routes: _Routes, generation: Generation, pieces: asyncio.Queue, start: float) -> None:
        self.routes = routes
        self.generation = generation
        self.pieces = pieces
        self.start = start
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def next_piece(self, request: Request) -> str | None:
        """The next piece of text; None at the end. Raises the error of the answer, and cancels it if nobody waits."""
        piece = asyncio.ensure_future(self.pieces.get())
        left = asyncio.ensure_future(_until_disconnected(request))
        try:
            await asyncio.wait((piece, left), return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                raise ApiError(400, "the client left before its answer was complete.", code="disconnected")
            if piece.result() is None and self.generation.error is not None:
                raise _api_error(self.generation.error) or _failure(self.generation.error)
            return piece.result()
        except BaseException:
            self.generation.cancel()
            raise
        finally:
            piece.cancel()
            left.cancel()

    async def complete(self, request: Request) -> dict[str, Any]:
        """The response of a request without streaming."""
        while await self.next_piece(request) is not None:
            pass
        message = {"role": "assistant", "content": self.generation.text, "boxes": self._boxes()}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": self.generation.finish_reason,
            "logprobs": None,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    async def events(self, request: Request, first: str | None, includes_usage: bool) -> AsyncIterator[str]:
        """The events of a streamed response. An error after the first piece is an event."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            piece = first
            while piece is not None:
                yield self._event({"content": piece})
                piece = await self.next_piece(request)
            yield self._event({"boxes": self._boxes()}, self.generation.finish_reason)
            usage = self._usage()
            if includes_usage:
                chunk = {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.content)}\n\n"
        finally:
            self.generation.cancel()  # nothing, if it is complete

    def _event(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps({**self._head('chat.completion.chunk'), 'choices': [choice]})}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        model = self.routes.settings.model_name
        return {"id": self.id, "object": kind, "created": self.created, "model": model}

    def _boxes(self) -> list[dict[str, Any]]:
        boxes = named_boxes(self.routes.engine.processor, self.generation.text, self.generation.prompt)
        return [{"name": box.name, "box": list(box.box)} for box in boxes]

    def _usage(self) -> dict[str, int]:
        """Tokens of the answer, which are counted in the metrics."""
        prompt, answer = self.generation.prompt.num_tokens, len(self.generation.tokens)
        metrics = self.routes.metrics
        metrics.tokens.labels("prompt").inc(prompt)
        metrics.tokens.labels("answer").inc(answer)
        if self.generation.first_token_time is not None:
            metrics.first_token_seconds.observe(self.generation.first_token_time - self.start)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _bank(stored: StoredBank) -> dict[str, Any]:
    identities = [{"name": name, "photos": len(stored.bank.photos(name))} for name in stored.bank.names]
    return {
        "id": stored.name,
        "object": "identity_bank",
        "created": stored.created,
        "stored": stored.is_kept,
        "identities": identities,
    }


async def _read(request: Request, model: type[_Body]) -> _Body:
    """The body of a request, checked. Nothing else keeps it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser sends other types across sites without asking
        raise ApiError(415, "Content-Type must be application/json.", code="unsupported_media_type")
    chunks = [chunk async for chunk in request.stream()]
    try:
        return model.model_validate_json(b"".join(chunks))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise ApiError(400, f"{place}: {first['msg']}.", code="invalid_value", param=place) from None


@contextmanager
def _as_api_errors() -> Iterator[None]:
    """Turns the errors of prompts, banks and answers into those of the interface."""
    try:
        yield
    except ApiError:
        raise
    except Exception as error:
        found = _api_error(error)
        if found is None:
            raise
        raise found from None


def _api_error(error: BaseException) -> ApiError | None:
    known: list[tuple[type[BaseException], Callable[[], ApiError]]] = [
        (PromptTooLong, lambda: ApiError(400, str(error), code="context_length_exceeded", param="messages")),
        (Forbidden, lambda: ApiError(403, str(error), code="forbidden", param="messages")),
        (PermissionError, lambda: ApiError(403, str(error), code="forbidden", param="store")),
        (FileExistsError, lambda: ApiError(409, str(error), code="bank_exists", param="name")),
        (TooManyBanks, lambda: ApiError(429, str(error), code="too_many_banks")),
        (DeadlineExceeded, lambda: ApiError(503, f"{error}.", code="deadline_exceeded")),
        ((EngineClosed, Cancelled), lambda: ApiError(503, "the server is stopping.", code="stopping")),
        (ValueError, lambda: ApiError(400, str(error), code="invalid_value")),
    ]
    return next((make() for kinds, make in known if isinstance(error, kinds)), None)


def _failure(error: Exception) -> ApiError:
    """A fault of the server, which is logged without its message: that may quote the request."""
    log_failure(error)
    return _SERVER_ERROR


def _put_from_thread(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue, piece: str | None) -> None:
    try:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)
    except RuntimeError:  # the server has ended
        return


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
