"""``idavlm serve``: the openai client against a real server, clients that misbehave, and the end of the process."""

import asyncio
import base64
import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from idavlm import ask
from idavlm.cli.main import main
from idavlm.inference import BankStore, BatchingEngine, GenerationOptions, PromptEncoder, batching
from idavlm.utils.freed_memory import return_freed_memory
from tests.small_models import answering_model, small_processor

serving = pytest.importorskip("idavlm.inference.server", reason="needs the extra serve", exc_type=ModuleNotFoundError)
openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
KEY = "a-secret-key"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small():
    """A model with random weights, whose answers depend on the prompt and do not end before max_tokens."""
    processor = small_processor()
    model = answering_model(processor)
    model.generation_config.eos_token_id = processor.image_token_id  # which is never generated
    return model, processor


class RunningServer:
    """A server in a thread of this process, and its clients."""

    def __init__(self, small, root, *, folder=None, send_buffer=None, **settings) -> None:
        self.batches = []
        self.engine = BatchingEngine(*small)
        self.banks = BankStore(self.engine, folder=folder)
        limits = {"max_prompt_tokens": 2000, "body_timeout": 60.0, "max_new_tokens": 4000, **settings}
        self.settings = serving.ServerSettings("tiny", api_keys=(KEY,), image_root=root, **limits)
        self.gate = serving.create_app(self.engine, self.banks, self.settings)
        count = self.engine.on_batch
        self.engine.on_batch = lambda report: (self.batches.append(report.rows), count(report))
        listener = serving.listen("127.0.0.1", 0)
        if send_buffer is not None:  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.address = listener.getsockname()
        self.server = serving.GracefulServer(self.gate)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def ask(self, content, **options):
        options = {"model": "tiny", "max_tokens": 8, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)

    def post(self, content="Hello", **options):
        body = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": content}], **options}
        return self.http.post("/v1/chat/completions", json=body)

    def stop(self) -> None:
        self.http.close()
        self.client.close()
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(*args, **options):
    server = RunningServer(*args, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(small, root):
    with running(small, root) as server:
        yield server


def data_url(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        image = stream.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_part(image):
    return {"type": "image_url", "image_url": {"url": image if isinstance(image, str) else data_url(image)}}


def of_cast(root, number):
    """Photos of two identities and a scene that differ from number to number."""
    files = ["kate.png", "tom.png", "other.png", "scene.png"]
    photos = [Image.open(root / files[(number + shift) % 4]).rotate(5 * number) for shift in range(3)]
    return {"Kate": photos[:2], f"Tom {number}": photos[2:]}, photos[0].rotate(90)


def content_of(cast, scene, question):
    identities = [
        {"type": "identity", "name": name, "images": list(map(data_url, photos))} for name, photos in cast.items()
    ]
    return [*identities, image_part(scene), {"type": "text", "text": question}]


def test_the_openai_client_gets_the_answers_of_python(server, small, root):
    cast, scene = of_cast(root, 1)
    content = content_of(cast, scene, "Where is Kate?")
    expected = ask(*small, "Where is Kate?", images=[scene], identities=cast, max_new_tokens=8)
    answer = server.ask(content)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 8 + answer.usage.prompt_tokens
    for box in answer.choices[0].message.boxes:
        assert len(box["box"]) == 4
    chunks = list(server.ask(content, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert len(chunks) > 4, "the text arrives in pieces"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].choices[0].delta.boxes == answer.choices[0].message.boxes
    assert chunks[-1].usage == answer.usage
    files = [{"type": "image", "image": "scene.png"}, image_part(f"file://{root / 'tom.png'}")]
    expected = ask(*small, "Who is that?", images=[root / "scene.png", root / "tom.png"], max_new_tokens=8)
    assert server.ask([*files, {"type": "text", "text": "Who is that?"}]).choices[0].message.content == expected
    assert server.ask("What?").choices[0].message.content == ask(*small, "What?", max_new_tokens=8)
    whole = ask(*small, "What?", max_new_tokens=8)
    stopped = server.ask("What?", stop=whole[3:6]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole.partition(whole[3:6])[0].strip(), "stop")
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "idavlm"


def test_the_async_client_and_options(server):
    async def draw():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What?"}]
            options = {"model": "tiny", "max_completion_tokens": 8, "temperature": 1.3, "top_p": 0.9}
            calls = [client.chat.completions.create(messages=messages, seed=seed, **options) for seed in (1, 1, 2, 3)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    answers = asyncio.run(draw())
    assert answers[0] == answers[1], "the same seed"
    assert len(set(answers)) == 3


def test_banks(server, small, root):
    cast, scene = of_cast(root, 2)
    identities = [{"name": name, "images": list(map(data_url, photos))} for name, photos in cast.items()]
    created = server.http.post("/v1/identities", json={"name": "office", "identities": identities})
    assert created.status_code == 201
    assert created.json()["identities"] == [{"name": "Kate", "photos": 2}, {"name": "Tom 2", "photos": 1}]
    assert created.json()["stored"] is False
    assert server.http.get("/v1/identities").json()["data"] == [created.json()]
    expected = ask(*small, "Where is Kate?", images=[scene], identities=cast, max_new_tokens=8)
    scene_and_question = [image_part(scene), {"type": "text", "text": "Where is Kate?"}]
    answer = server.ask(scene_and_question, extra_body={"bank": "office"})
    assert answer.choices[0].message.content == expected
    one = [{"type": "identity", "name": "Kate"}, *scene_and_question]
    only = ask(*small, "Where is Kate?", images=[scene], identities={"Kate": cast["Kate"]}, max_new_tokens=8)
    assert server.ask(one, extra_body={"bank": "office"}).choices[0].message.content == only
    assert server.http.post("/v1/identities", json={"name": "office", "identities": identities}).status_code == 409
    assert server.http.get("/v1/identities/office").status_code == 200
    assert server.http.delete("/v1/identities/office").json()["deleted"] is True
    assert server.http.get("/v1/identities/office").status_code == 404
    assert server.http.delete("/v1/identities/office").status_code == 404
    with pytest.raises(openai.NotFoundError, match="no bank 'office'"):
        server.ask(scene_and_question, extra_body={"bank": "office"})
    kept = server.http.post("/v1/identities", json={"name": "kept", "identities": identities, "store": True})
    assert kept.status_code == 403, "there is no folder"
    wrong = server.http.post("/v1/identities", json={"name": "x", "identities": [{"name": "Kate", "images": ["../k"]}]})
    assert wrong.status_code == 403


def test_stored_banks_outlive_the_server_until_they_are_deleted(small, root, tmp_path):
    folder = tmp_path / "banks"
    identities = [{"name": "Kate", "images": ["kate.png"]}]
    with running(small, root, folder=folder) as server:
        body = {"name": "office", "identities": identities, "store": True}
        assert server.http.post("/v1/identities", json=body).json()["stored"] is True
        server.http.post("/v1/identities", json={"name": "visit", "identities": identities})
    with running(small, root, folder=folder) as server:
        assert [bank["id"] for bank in server.http.get("/v1/identities").json()["data"]] == ["office"]
        assert server.http.delete("/v1/identities/office").status_code == 200
        assert list(folder.iterdir()) == []


def test_without_storing(small, root):
    with running(small, root, allow_banks=False) as server:
        identities = [{"name": "Kate", "images": ["kate.png"]}]
        refused = server.http.post("/v1/identities", json={"name": "office", "identities": identities})
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "storing_disabled"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt'"),
        ({"max_tokens": 5000}, 400, "more than the 4000"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1"),
        ({"temperature": 3}, 400, "temperature=3.0 must be between"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"n": 2}, 400, "send 2 requests"),
        ({"logprobs": True}, 400, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"stream_options": {}}, 400, "stream_options need stream"),
        ({"workflow": "grounding"}, 400, "no inner adaptors"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role='tool' is not known"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "no user turn"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "tool_calls is not supported"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "placeholder"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, 400, "is a audio part"),
        ({"content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}, 400, "data URL"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]}, 400, "base64"),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}]}, 400, "of the form data:"),
        ({"content": [{"type": "image", "image": "missing.png"}]}, 400, "no file below the image root"),
        ({"content": [{"type": "image", "image": "a\0b"}]}, 400, "cannot be a path"),
        ({"content": [{"type": "image", "image": 7}]}, 400, "must be a data URL or a path"),
        ({"content": [{"type": "image", "image": "../x.png"}]}, 403, "outside the image root"),
        ({"content": [{"type": "image", "image": "/etc/passwd"}]}, 403, "outside the image root"),
        ({"content": [{"type": "image", "image": "file:///etc/passwd"}]}, 403, "outside the image root"),
        ({"content": [{"type": "image", "image": "scene.png"}] * 33}, 400, "a request may have 32"),
        ({"content": [{"type": "identity", "name": "Kate"}]}, 400, "without images"),
        ({"content": [{"type": "identity", "name": "Kate", "images": ["../k.png"]}]}, 403, "outside the image root"),
        ({"content": "word " * 10_000}, 400, "tokens"),
    ],
)  # fmt: skip
def test_mistakes_have_a_status_and_a_reason(server, options, status, message):
    response = server.post(**options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["code"]
    assert str(ROOT) not in error["message"]


def test_a_link_does_not_lead_out_of_the_image_root(server, root, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    link = root / "link.png"
    link.symlink_to(outside)
    try:
        response = server.post([{"type": "image", "image": "link.png"}])
    finally:
        link.unlink()
    assert response.status_code == 403
    assert str(outside) not in response.text


def test_mistakes_as_the_openai_client_sees_them(server, root):
    for key, options, error in (
        ("wrong", {}, openai.AuthenticationError),
        (KEY, {"model": "gpt"}, openai.NotFoundError),
        (KEY, {"temperature": 5}, openai.BadRequestError),
        (KEY, {"messages": [{"role": "user", "content": [image_part("../x.png")]}]}, openai.PermissionDeniedError),
    ):
        options = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 1, **options}
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client,
            pytest.raises(error) as caught,
        ):
            client.chat.completions.create(**options)
        assert caught.value.body["message"]


def test_requests_that_are_no_chat(server):
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert server.http.get("/v1/chat/completions").status_code == 405
    assert (
        server.http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    json_type = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b'{"model": "tiny"}', b"[" * 100_000, b"\xff\xfe", b'{"model": "\\ud800"}'):
        assert server.http.post("/v1/chat/completions", content=body, headers=json_type).status_code == 400, body[:20]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    server.ask("What?")
    text = server.http.get("/metrics").text
    for name in (
        "idavlm_requests_total",
        "idavlm_first_token_seconds_count",
        "idavlm_batch_rows_sum",
        "process_open_fds",
    ):
        assert name in text


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (100_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def send_raw(server, data: bytes, seconds: float = 5.0) -> bytes:
    """Send bytes over a connection of their own, and return what comes back until it is closed."""
    with socket.create_connection(server.address, timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk
    return received


def send_slowly(server, data: bytes, *, pause: float = 0.2) -> bytes:
    """Send the beginning of a request, then a byte after each pause. Returns the beginning of the answer."""
    with socket.create_connection(server.address, timeout=pause) as connection:
        connection.sendall(data)
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                return connection.recv(65536)
            connection.sendall(b" ")
    raise AssertionError("the server waits for as long as bytes arrive")


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *more]
    return "\r\n".join([*lines, "Content-Type: application/json", f"Content-Length: {length}", "", ""]).encode()


def abuse(server, big: bytes) -> None:
    """Everything that a server on a network meets."""
    assert server.http.post("/v1/chat/completions", content=big).status_code == 413
    wrong = {"Authorization": "Bearer wrong"}
    assert server.http.post("/v1/chat/completions", content=big[: 2**20], headers=wrong).status_code == 401
    assert b" 413 " in send_raw(server, head(10**12, "Expect: 100-continue")).partition(b"\r\n")[0]
    assert b" 400 " in send_raw(server, b"\x16\x03\x01 no HTTP\r\n\r\n").partition(b"\r\n")[0]
    for image, text in (
        (bomb(), "is too large"),
        (Image.new("RGB", (2, 8000)), "aspect ratio"),
        (b"x", "not an"),
    ):
        response = server.post([image_part(image if isinstance(image, str) else data_url(image))])
        assert (response.status_code, text in response.text) == (400, True), response.text
    assert server.post("word " * 10_000).status_code == 400
    # A client that leaves in the middle of its answer, and one that leaves before it.
    with server.http.stream("POST", "/v1/chat/completions", json=long_request(stream=True)) as response:
        next(response.iter_bytes())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=long_request(), timeout=0.2)


def long_request(**options):
    message = {"role": "user", "content": "Tell me everything."}
    return {"model": "tiny", "messages": [message], "max_tokens": 1900, **options}


def wait_until(is_true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_abuse_leaves_nothing(server):
    """The server answers afterwards, and has the open files and the memory that it had before."""
    process = psutil.Process()

    def used():
        gc.collect()
        wait_until(lambda: server.gate.num_requests == 0 and not server.engine.num_waiting)
        wait_until(lambda: not server.server.server_state.connections)  # idle connections are closed
        return process.num_fds(), process.memory_info().rss

    content = [image_part(data_url(bytes(100 * 2**20)))]
    big = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}).encode()
    before_http, server.http = server.http, httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {KEY}", "Connection": "close"}, timeout=60
    )  # fmt: skip
    before_http.close()
    server.client.close()
    server.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)
    abuse(server, big)  # allocates what is allocated once
    files, memory = used()
    abuse(server, big)
    files_after, memory_after = used()
    assert files_after <= files
    assert memory_after - memory < 32 * 2**20
    assert server.gate.bytes_in_flight == 0
    assert server.ask("What?").choices[0].message.content


def test_requests_that_never_arrive_are_ended(small, root):
    with running(small, root, body_timeout=1.0) as server:
        half = head(1000) + b'{"model": "tiny", '
        assert send_raw(server, half).startswith(b"HTTP/1.1 408 ")
        assert send_slowly(server, half).startswith(b"HTTP/1.1 408 ")
        assert send_raw(server, b"POST /v1/chat/comple") == b"", "headers that never end"
        # The beginning of a second request over a connection that stays open.
        with socket.create_connection(server.address, timeout=20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
            received = b""
            with contextlib.suppress(ConnectionError):
                while chunk := connection.recv(65536):
                    received += chunk
        assert received.count(b"HTTP/1.1 200 ") == 1
        server.http.close()
        wait_until(lambda: not server.server.server_state.connections)


def test_a_client_that_does_not_read_is_disconnected(small, root):
    with running(small, root, stall_timeout=0.3, send_buffer=4096) as server:
        with socket.socket() as connection:
            connection.settimeout(20)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(server.address)
            request = (
                head(0).replace(b"POST /v1/chat/completions", b"GET /metrics").replace(b"Content-Length: 0", b"X: x")
            )
            with contextlib.suppress(ConnectionError):
                connection.sendall(request * 200)  # responses of a megabyte, none of which is read
            wait_until(lambda: not server.server.server_state.connections)
        assert server.ask("What?").choices[0].message.content


def test_a_client_that_leaves_ends_its_answer(server):
    with server.http.stream("POST", "/v1/chat/completions", json=long_request(stream=True)) as response:
        next(response.iter_bytes())
    start = time.monotonic()
    assert server.ask("What?", max_tokens=1).choices[0].message.content is not None
    wait_until(lambda: not server.engine._running)
    assert time.monotonic() - start < 5


def test_deadline_and_concurrency(small, root):
    with running(small, root, deadline=0.3, max_requests=2) as server:
        late = server.http.post("/v1/chat/completions", json=long_request())
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "deadline_exceeded"
        with pytest.raises(openai.APIError, match="deadline"):
            list(server.client.chat.completions.create(**long_request(stream=True)))
        with ThreadPoolExecutor(6) as pool:
            statuses = list(pool.map(lambda _: server.http.post("/v1/chat/completions", json=long_request()), range(6)))
        statuses = [response.status_code for response in statuses]
        assert statuses.count(429) >= 1
        assert statuses.count(503) >= 2
        assert set(statuses) == {429, 503}


def test_many_clients_get_their_own_answers(server, small, root):
    """Each asks about its own cast, half of them streaming. Their requests share forward passes."""
    clients, rounds = 24, 2
    casts = [of_cast(root, number) for number in range(clients)]
    expected = [
        ask(*small, f"Where is Tom {number}?", images=[scene], identities=cast, max_new_tokens=10)
        for number, (cast, scene) in enumerate(casts)
    ]
    assert len(set(expected)) > clients / 2, "answers that are alike would prove nothing"
    contents = [content_of(cast, scene, f"Where is Tom {number}?") for number, (cast, scene) in enumerate(casts)]
    del server.batches[:]

    def client(number):
        answers = []
        for round_ in range(rounds):
            answer = server.ask(contents[number], max_tokens=10, stream=(number + round_) % 2 == 0)
            if (number + round_) % 2 == 0:
                answers.append("".join(chunk.choices[0].delta.content or "" for chunk in answer))
            else:
                answers.append(answer.choices[0].message.content)
        return answers

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(client, range(clients)))
    assert answers == [[text] * rounds for text in expected]
    assert sum(server.batches) == clients * rounds
    assert len(server.batches) < clients * rounds / 2


def test_freed_memory_is_returned_once_the_engine_is_idle(small, monkeypatch):
    returned = []
    monkeypatch.setattr(batching, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(batching, "return_freed_memory", lambda: returned.append(time.monotonic()))
    with BatchingEngine(*small) as engine:
        prompt = PromptEncoder(engine.processor).encode([{"role": "user", "content": "What?"}])
        for number in (1, 2):
            engine.submit(prompt, GenerationOptions(max_new_tokens=2)).result()
            wait_until(lambda number=number: len(returned) == number)
            time.sleep(0.3)
            assert len(returned) == number, "once, until there is another request"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps freed memory")
def test_returned_memory_is_no_longer_resident():
    """Blocks between others that stay: glibc returns none of them by itself."""
    process = psutil.Process()
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    blocks = [library.malloc(2**16) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 2**16)
    for block in blocks[::2]:
        library.free(block)
    before = process.memory_info().rss
    return_freed_memory()
    assert before - process.memory_info().rss > 40 * 2**20
    for block in blocks[1::2]:
        library.free(block)


def test_nothing_of_a_request_is_logged(server, root, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "Zebedee"
    photo = data_url(Image.open(root / "kate.png"))
    identity = {"type": "identity", "name": secret, "images": [photo]}
    body = {"name": secret, "identities": [{"name": secret, "images": [photo]}]}
    assert server.http.post("/v1/identities", json=body).status_code == 201
    server.ask([identity, {"type": "text", "text": f"Where is {secret}?"}])
    server.post([identity, identity, {"type": "text", "text": secret}])
    server.http.get(f"/v1/identities/{secret}")
    server.http.delete(f"/v1/identities/{secret}")
    engine_collate, server.engine.collate = server.engine.collate, None  # a bug of the server
    try:
        assert server.post(secret).status_code == 500
    finally:
        server.engine.collate = engine_collate
    of_server = [record.getMessage() for record in caplog.records if record.name.startswith(("idavlm", "uvicorn"))]
    logged = "\n".join(of_server) + "".join(capfd.readouterr())
    assert "DELETE /v1/identities/{name} 200" in logged
    assert "TypeError in" in logged
    assert secret not in logged
    assert photo[30:60] not in logged
    assert KEY not in logged


def test_the_process_ends_gracefully_and_starts_within_ten_seconds(small, tmp_path):
    """SIGTERM under load: running requests are answered, new ones get 503, and the exit status is 0."""
    for part in small:
        part.save_pretrained(tmp_path / "model")
    arguments = ["serve", "--model", tmp_path / "model", "--model-name", "tiny", "--port", "0", "--no-store"]
    command = [sys.executable, "-m", "idavlm.cli.main", *map(str, arguments)]
    environment = {**os.environ, "IDAVLM_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=tmp_path)
    try:
        url = process.stdout.readline().split()[-1]
        processor_seconds = sum(psutil.Process(process.pid).cpu_times()[:2])
        assert url.startswith("http://127.0.0.1"), (tmp_path / "log").read_text()
        assert processor_seconds < 10, "seconds of a processor, which other work on the machine does not change"
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=5)
        message = {"role": "user", "content": "What?"}
        assert client.chat.completions.create(model="tiny", messages=[message], max_tokens=1).choices
        bank = {"name": "office", "identities": [{"name": "Kate", "images": [data_url(Image.new("RGB", (8, 8)))]}]}
        with pytest.raises(openai.PermissionDeniedError, match="stores nothing"):
            client.post("/identities", body=bank, cast_to=object)
        with ThreadPoolExecutor(8) as pool:
            options = {"model": "tiny", "messages": [message], "max_tokens": 300, "stream": True}
            streams = [client.chat.completions.create(**options) for _ in range(8)]
            first = [next(iter(stream)) for stream in streams]
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            statuses = [httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"}).status_code]
            statuses.append(httpx.get(url.replace("/v1", "/health")).status_code)
            ends = list(pool.map(lambda stream: list(stream)[-1].choices[0].finish_reason, streams))
        assert len(first) == 8
        assert statuses == [503, 503]
        assert ends == ["length"] * 8
        assert process.wait(20) == 0
        client.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        log.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "no API key; set IDAVLM_API_KEY"),
        (["--image-root", "nowhere"], "image_root='nowhere' is not a folder"),
        (["--max-body-mb", "0"], "must be an integer of at least 1"),
        (["--port", "99999"], "a number between 0 and 65535"),
        (["--store", "x", "--no-store"], "not allowed with"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--host", "203.0.113.1", "--api-key-file", "keys"], "cannot be used"),
    ],
)
def test_mistakes_of_the_command_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IDAVLM_API_KEY", raising=False)
    (tmp_path / "keys").write_text("key\n")
    with contextlib.suppress(SystemExit):  # of argparse
        assert main(["serve", "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_without_a_key_only_this_machine_is_served(small, root):
    with running(small, root) as server:
        object.__setattr__(server.settings, "api_keys", ())
        assert server.post(max_tokens=1).status_code == 200
        rebound = server.http.get("/v1/models", headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        assert "is not this machine" in rebound.json()["error"]["message"]


def test_limits_of_settings_are_checked(root):
    for wrong, message in (
        ({"max_images": 0}, "max_images=0"),
        ({"deadline": 0.0}, "deadline=0.0"),
        ({"max_body_bytes": 2**40}, "larger than max_bytes_in_flight"),
        ({"image_root": root / "scene.png"}, "is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            serving.ServerSettings("tiny", **wrong)


def test_the_example_client(server, root, monkeypatch, capsys):
    monkeypatch.setenv("IDAVLM_API_KEY", KEY)
    arguments = ["--url", f"{server.url}/v1", "--identity", "Kate", str(root / "kate.png"), str(root / "other.png")]
    arguments += ["--scene", str(root / "scene.png"), "--question", "Where is Kate?"]
    shown = []
    for more in ([], ["--bank", "example"]):
        monkeypatch.setattr(sys, "argv", ["ask_server.py", *arguments, *more])
        runpy.run_path(str(ROOT / "examples" / "ask_server.py"), run_name="__main__")
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "\nboxes: [" in shown[0]
    assert server.http.get("/v1/identities").json()["data"] == []
