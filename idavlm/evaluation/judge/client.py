"""An OpenAI-compatible chat endpoint: key from the environment, retries with back-off, a rate limit, a cache."""

import contextlib
import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from random import Random

from idavlm.evaluation.judge.cache import ReplyCache
from idavlm.utils import check_positive

_RETRIED = (408, 409, 429, 500, 502, 503, 504, 529)


class JudgeError(OSError):
    """The endpoint gave no reply that can be used."""


@dataclass
class JudgeClient:
    """Asks a judge model; the same question is never paid for twice.

    Attributes:
        model: name of the model at the endpoint.
        base_url: as ``https://api.openai.com/v1``; ``OPENAI_BASE_URL`` if not given.
        api_key: ``OPENAI_API_KEY`` if not given; local servers need none. It is never written anywhere.
        cache: a ``.jsonl`` file of replies; None for none.
        timeout: seconds until a reply that does not come is given up.
        retries: how often a request is sent again after 429, 5xx, a time-out, a broken connection or broken JSON.
        backoff: seconds before the first retry, then twice as many each time, with some chance so that clients part;
            what ``Retry-After`` asks for, if more.
        requests_per_minute: at most so many, retries included; None for no limit.
        max_tokens: longest reply.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    cache: str | Path | None = None
    timeout: float = 60.0
    retries: int = 6
    backoff: float = 1.0
    requests_per_minute: float | None = None
    max_tokens: int = 256

    MAX_BACKOFF = 60.0

    def __post_init__(self) -> None:
        check_positive(max_tokens=self.max_tokens)
        for name in ("timeout", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0.")
        self.base_url = (self.base_url or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/")
        if not self.base_url:
            raise ValueError("base_url is not set; export OPENAI_BASE_URL, e.g. http://localhost:8000/v1.")
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={self.base_url!r} must begin with http:// or https://.")
        self.api_key = self.api_key or os.environ.get("OPENAI_API_KEY")
        self._replies = ReplyCache(self.cache)
        self._lock = threading.Lock()
        self._under_way: dict[str, threading.Lock] = {}
        self._next_start = 0.0
        self._random = Random(0)

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The reply to a conversation of ``{"role", "content"}``, at temperature 0.

        Raises:
            JudgeError: an error that asking again will not mend (401, 400 ...), or too many others.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            waiting = self._under_way.setdefault(key, threading.Lock())
        with waiting:  # whoever asks the same meanwhile waits for this reply
            reply = self._replies.get(key)
            if reply is None:
                reply = self._request(body)
                self._replies.put(key, reply)
        return reply

    def _request(self, body: dict) -> str:
        problem = ""
        for attempt in range(self.retries + 1):
            self._wait_for_turn()
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                text = error.read(2000).decode(errors="replace")
                problem = f"HTTP {error.code}: {text[:300]}"
                if error.code not in _RETRIED:
                    raise JudgeError(f"{self.base_url} refuses {self.model!r}: {problem}") from None
                asked = error.headers.get("Retry-After")
            # Hanging, cut off (IncompleteRead), not JSON, or JSON of another shape.
            except (OSError, ValueError, KeyError, IndexError, TypeError, HTTPException) as error:
                problem, asked = f"{type(error).__name__}: {error}", None
            if attempt < self.retries:
                time.sleep(self._pause(attempt, asked))
        raise JudgeError(f"{self.base_url} gave no reply in {self.retries + 1} tries; the last: {problem}")

    def _send(self, body: dict) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            message = json.loads(response.read())["choices"][0]["message"]
        # A refusal may come with content null; it is a reply, and one without a score.
        reply = message.get("content") or message.get("refusal") or ""
        if not isinstance(reply, str):
            raise TypeError(f"content is {type(reply).__name__}")
        return reply

    def _pause(self, attempt: int, asked: str | None) -> float:
        with self._lock:
            pause = self.backoff * 2**attempt * self._random.uniform(0.75, 1.25)
        with contextlib.suppress(ValueError):  # of a date: the back-off will do
            pause = max(pause, float(asked or 0))
        return min(pause, self.MAX_BACKOFF)

    def _wait_for_turn(self) -> None:
        if self.requests_per_minute is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 60.0 / self.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))
