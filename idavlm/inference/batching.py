"""Answers of one model to many callers: requests that wait share a forward pass.

transformers' continuous batching takes token ids only, and its server runs requests with images one after the other.
:class:`BatchingEngine` therefore collects the requests that wait and calls ``generate`` once for all of them. Every row
has its own options and its own tokens, which its caller receives at every step.
"""

import contextlib
import copy
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from idavlm.inference.generation_options import GenerationOptions, choose_token
from idavlm.inference.prompts import Prompt
from idavlm.inference.text_stream import TextStream
from idavlm.models.stored_photos import IdentitiesOfSamples
from idavlm.modules.inner_adaptor.workflow import find_inner_adaptor, use_workflow
from idavlm.utils import check_choice, check_positive
from idavlm.utils.freed_memory import return_freed_memory

# Fields of an encoded prompt that only training uses.
_TRAINING_FIELDS = ("labels", "boxes", "box_image", "box_identity", "source", "sample_ids")

_IDLE_SECONDS = 5.0
"""Time without requests after which memory is returned to the system."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class DeadlineExceeded(TimeoutError):
    """An answer was not complete at its deadline."""


class Cancelled(RuntimeError):
    """The caller no longer wants the answer."""


class Generation:
    """One answer in the making. :meth:`BatchingEngine.submit` returns it.

    Iterate over it for the text as it arrives, or call :meth:`result`.

    Attributes:
        prompt, options: what was submitted.
        tokens: the tokens of the answer so far, without the token that ends it.
        finish_reason: ``"stop"`` or ``"length"`` (``max_new_tokens`` are reached) once the answer is complete.
        error: why there is no complete answer.
        first_token_time: ``time.monotonic()`` of the first token.
    """

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        tokenizer,
        *,
        stop: Sequence[str] = (),
        deadline: float | None = None,
        on_text: Callable[[str | None], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.deadline = deadline
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.first_token_time: float | None = None
        self.generator = options.new_generator()
        self._stream = TextStream(tokenizer, (*options.stop, *stop))
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._on_text = self._pieces.put if on_text is None else on_text
        self._is_done = threading.Event()
        self._ending = threading.Lock()  # a caller may cancel while the model's thread completes the answer

    @property
    def is_done(self) -> bool:
        """Whether no more tokens follow."""
        return self._is_done.is_set()

    @property
    def text(self) -> str:
        """The text so far."""
        return self._stream.text

    def __iter__(self) -> Iterator[str]:
        """Pieces of the text as they arrive; raises the error of the answer at its end."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        if self.error is not None:
            raise self.error

    def result(self, timeout: float | None = None) -> str:
        """Wait for the whole answer and return it. Raises the error of the answer, or TimeoutError."""
        if not self._is_done.wait(timeout):
            raise TimeoutError(f"there is no answer after {timeout} s.")
        if self.error is not None:
            raise self.error
        return self.text

    def cancel(self) -> None:
        """Say that the answer is no longer wanted; its row leaves the batch."""
        self.fail(Cancelled("the request was cancelled"))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self._end(error=error)

    def take(self, token: int, ends: frozenset[int]) -> None:
        """Add a token, of which ``ends`` end the answer."""
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
        if token in ends:
            self._complete("stop")
            return
        self.tokens.append(token)
        self._emit(self._stream.add(token))
        if self._stream.is_stopped:
            self._complete("stop")
        elif len(self.tokens) >= self.options.max_new_tokens:
            self._complete("length")

    def _complete(self, reason: str) -> None:
        self._emit(self._stream.finish())
        self._end(finish_reason=reason)

    def _emit(self, piece: str) -> None:
        if piece:
            self._on_text(piece)

    def _end(self, *, finish_reason: str | None = None, error: Exception | None = None) -> None:
        with self._ending:
            if self.is_done:
                return
            self.finish_reason, self.error = finish_reason, error
            self._is_done.set()
        self._on_text(None)


@dataclass(frozen=True)
class BatchReport:
    """One call of ``generate``: number of rows, tokens of the prompts, steps and seconds."""

    rows: int
    prompt_tokens: int
    steps: int
    seconds: float


class BatchingEngine:
    """Runs one model in one thread for many callers.

    A batch holds the requests that wait, in the order of their arrival, as far as they use the same workflow and fit
    into the limits. An answer that is complete is delivered at once. While other requests wait, a batch ends after
    ``slice_tokens`` steps, or once three quarters of its answers are complete: the others continue in the next batch,
    with their beginning as part of the prompt.

    A request that fails does not affect others: the batch is halved until the row that fails is alone.

    After a few seconds without requests, memory that batches have freed is returned to the system.

    Args:
        model: a model of idavlm or of transformers that generates text; set to evaluation mode.
        processor: its processor.
        max_batch_size: largest number of rows of a batch.
        max_batch_tokens: largest number of rows times the length of the longest row with its answer. A single request
            may be longer.
        max_wait: seconds that the engine waits for requests that are being prepared before a batch starts.
        slice_tokens: largest number of steps of a batch while other requests wait.
        on_batch: called with a :class:`BatchReport` after every batch.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 65536,
        max_wait: float = 0.02,
        slice_tokens: int = 64,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        check_positive(max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens, slice_tokens=slice_tokens)
        self.model = model.eval()
        self.processor = processor
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_wait = max_wait
        self.slice_tokens = slice_tokens
        self.on_batch = on_batch
        self._config = _generation_config(model, processor.tokenizer)
        self._ends = _token_set(self._config.eos_token_id)
        self._stop_strings = tuple(_as_list(getattr(model.generation_config, "stop_strings", None)))
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._running: list[Generation] = []
        self._num_preparing = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="idavlm-model", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BatchingEngine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a batch."""
        return len(self._waiting)

    @property
    def workflows(self) -> tuple[str, ...]:
        """Names of the workflows of a model with inner adaptors."""
        try:
            return tuple(find_inner_adaptor(self.model, "").state.names)
        except ValueError:
            return ()

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        deadline: float | None = None,
        on_text: Callable[[str | None], None] | None = None,
    ) -> Generation:
        """Queue a request.

        Args:
            prompt: from :meth:`PromptEncoder.encode`.
            options: how the answer is generated; greedily by default.
            deadline: ``time.monotonic()`` at which the answer fails with :class:`DeadlineExceeded`.
            on_text: called in the thread of the model with each piece of text, and with None at the end. Without it,
                iterate over the generation.

        Raises:
            ValueError: an unknown workflow, or more identities or images than the model has embeddings for.
            EngineClosed: after :meth:`close`.
        """
        options = GenerationOptions() if options is None else options
        if options.workflow is not None:
            find_inner_adaptor(self.model, options.workflow)
            check_choice("workflow", options.workflow, self.workflows)
        self._check_embeddings(prompt)
        generation = Generation(
            prompt, options, self.processor.tokenizer, stop=self._stop_strings, deadline=deadline, on_text=on_text
        )
        with self._changed:
            if self._is_closed:
                raise EngineClosed("the engine is closed and takes no more requests.")
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Within the block, a request is being prepared, for which a batch may wait."""
        with self._changed:
            self._num_preparing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_preparing -= 1
                self._changed.notify_all()

    def run(self, function: Callable[[], Any]) -> Future:
        """Call a function that uses the model in its thread, between two batches. Returns its future result."""
        future: Future = Future()
        with self._changed:
            if self._is_closed:
                raise EngineClosed("the engine is closed and takes no more requests.")
            self._jobs.append((function, future))
            self._changed.notify_all()
        return future

    def collate(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The inputs of the model for a batch of prompts, padded on the left, on the device of the model."""
        batch = self.processor.collate([prompt.encoded for prompt in prompts], padding_side="left")
        inputs: dict[str, Any] = {
            name: value.to(self.model.device)
            for name, value in batch.items()
            if isinstance(value, Tensor) and name not in _TRAINING_FIELDS
        }
        if any(photo is not None for prompt in prompts for photo in prompt.stored):
            inputs["identities"] = IdentitiesOfSamples(tuple(prompt.stored for prompt in prompts))
        return inputs

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, complete those that were submitted, and end the thread.

        Requests that are not complete after ``timeout`` seconds are cancelled.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.cancel_all()
            self._thread.join()

    def cancel_all(self) -> None:
        """Cancel all requests that wait or run."""
        with self._changed:
            for generation in (*self._waiting, *self._running):
                generation.cancel()

    def _run(self) -> None:
        has_freed_memory = False
        while True:
            with self._changed:
                while not (self._waiting or self._jobs or self._is_closed):
                    is_notified = self._changed.wait(_IDLE_SECONDS if has_freed_memory else None)
                    if not is_notified:
                        return_freed_memory()
                        has_freed_memory = False
                if not self._waiting and not self._jobs:
                    return
            has_freed_memory = True
            self._run_jobs()
            self._wait_for_prepared()
            with self._changed:
                self._running = self._next_batch()
            if self._running:
                self._generate(self._running)
            with self._changed:
                # Answers that are not complete go on after the requests that have waited longer.
                self._waiting.extend(row for row in self._running if not row.is_done)
                self._running = []

    def _run_jobs(self) -> None:
        """Run the functions of :meth:`run`. Nothing keeps them afterwards: they may hold photos."""
        with self._changed:
            jobs, self._jobs = self._jobs, deque()
        for function, future in jobs:
            _settle(function, future)

    def _wait_for_prepared(self) -> None:
        """Wait until the batch is full, no request is being prepared, or ``max_wait`` is over."""
        end = time.monotonic() + self.max_wait
        with self._changed:
            while self._waiting and self._num_preparing and len(self._waiting) < self.max_batch_size:
                if self._jobs or not self._changed.wait(end - time.monotonic()) or time.monotonic() > end:
                    return

    def _next_batch(self) -> list[Generation]:
        """Remove the rows of the next batch from the queue."""
        now = time.monotonic()
        batch: list[Generation] = []
        longest, passed = 0, []
        while self._waiting and len(batch) < self.max_batch_size:
            row = self._waiting.popleft()
            if row.deadline is not None and now > row.deadline:
                row.fail(DeadlineExceeded("the deadline passed before the answer began"))
            if row.is_done:
                continue
            length = max(longest, row.prompt.num_tokens + row.options.max_new_tokens)
            fits = length * (len(batch) + 1) <= self.max_batch_tokens
            if batch and (row.options.workflow != batch[0].options.workflow or not fits):
                passed.append(row)
                continue
            batch.append(row)
            longest = length
        self._waiting.extendleft(reversed(passed))
        return batch

    def _generate(self, rows: list[Generation]) -> None:
        """Run one batch; if it fails, its halves."""
        start = time.monotonic()
        try:
            steps = self._call_generate(rows)
        except Exception as error:  # of the model: a caller must get an answer, whatever it is
            remaining = [row for row in rows if not row.is_done]
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(rows) == 1:
                rows[0].fail(error)
                return
            del error  # its traceback holds the tensors of the batch
            middle = (len(remaining) + 1) // 2
            for half in (remaining[:middle], remaining[middle:]):
                if half:
                    self._generate(half)
            return
        if self.on_batch is not None:
            prompt_tokens = sum(row.prompt.num_tokens for row in rows)
            self.on_batch(BatchReport(len(rows), prompt_tokens, steps, time.monotonic() - start))

    def _call_generate(self, rows: list[Generation]) -> int:
        prompts = [row.prompt.continued(row.tokens) if row.tokens else row.prompt for row in rows]
        config = copy.deepcopy(self._config)
        config.max_new_tokens = max(row.options.max_new_tokens - len(row.tokens) for row in rows)
        workflow = rows[0].options.workflow
        delivery = _TokenDelivery(self, rows)
        image_token = getattr(self.model.config, "image_token_id", None)
        with contextlib.nullcontext() if workflow is None else use_workflow(self.model, workflow):
            self.model.generate(
                **self.collate(prompts),
                generation_config=config,
                logits_processor=LogitsProcessorList([_RowTokens(rows, image_token)]),
                stopping_criteria=StoppingCriteriaList([delivery]),
            )
        return delivery.num_steps

    def _check_embeddings(self, prompt: Prompt) -> None:
        """Check what would fail in the middle of a batch."""
        id_former = getattr(self.model, "id_former", None)
        if getattr(id_former, "identity_embedding", None) is not None:
            id_former.identity_embedding.check(len(prompt.names))
        embedding = getattr(self.model, "image_index_embedding", None)
        if embedding is not None and len(prompt.scene_sizes) > embedding.num_embeddings:
            raise ValueError(
                f"the prompt has {len(prompt.scene_sizes)} images, but the model distinguishes "
                f"{embedding.num_embeddings} (max_images); use fewer."
            )


class _RowTokens(LogitsProcessor):
    """Chooses the next token of each row by the options of the row; ``generate`` takes the largest logit."""

    def __init__(self, rows: Sequence[Generation], image_token: int | None) -> None:
        self.rows = rows
        self.image_token = image_token
        self.is_greedy = all(row.options.is_greedy for row in rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1).isfinite().tolist()  # NaN if any is NaN; logits of -inf may be intended
        for row, is_finite in zip(self.rows, finite, strict=True):
            if not is_finite:
                row.fail(
                    RuntimeError("the model computes logits that are NaN or infinite; check its weights and dtype")
                )
        if self.image_token is not None:
            scores[:, self.image_token] = -torch.inf
        if self.is_greedy:
            return scores
        for number, row in enumerate(self.rows):
            if not row.options.is_greedy and not row.is_done:
                token = choose_token(scores[number], row.options, row.tokens, row.generator)
                scores[number] = -torch.inf
                scores[number, token] = 0
        return scores


class _TokenDelivery(StoppingCriteria):
    """Hands each token to its row, and ends the rows that are complete, cancelled or late."""

    def __init__(self, engine: BatchingEngine, rows: Sequence[Generation]) -> None:
        self.engine = engine
        self.rows = rows
        self.num_steps = 0

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        now = time.monotonic()
        self.num_steps += 1
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.is_done:
                continue
            row.take(token, self.engine._ends)
            if row.deadline is not None and now > row.deadline:
                row.fail(DeadlineExceeded("the deadline passed before the answer was complete"))
        unfinished = sum(not row.is_done for row in self.rows)
        # Rows that are complete cost as much as the others. A few rows go on sooner in a batch with those that wait.
        is_over = self.num_steps >= self.engine.slice_tokens or unfinished <= len(self.rows) // 4
        is_over = is_over and self.engine.num_waiting > 0
        return torch.tensor([is_over or row.is_done for row in self.rows], device=input_ids.device)


def _settle(function: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # the caller's, whatever it is
        future.set_exception(error)


def _generation_config(model, tokenizer):
    """The generation config of the model, without what :class:`_RowTokens` and :class:`_TokenDelivery` do."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.num_beams, config.num_return_sequences, config.use_cache = False, 1, 1, True
    config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
    config.stop_strings = config.max_length = config.max_time = None
    config.return_dict_in_generate = False
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _token_set(token_ids: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset(_as_list(token_ids))


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
