"""Throughput of `idavlm serve`: many clients, each with a cast of its own, against one client that waits.

    python -m benchmarks.serving

The server is a process of its own. Each client has one record of the drawn characters: it creates a bank of its cast
(or sends the photos with every request, --photos) and asks its question again and again. First the questions are asked
one after the other, then by all clients at the same time, against the same server. Every answer is compared with
that of `generate` to the same question alone. Requests per second depend on other work on the machine; the time that
the processor spends on a request does not. The program fails if an answer is lost or differs, and, with
--least-speedup, if the throughput of all clients together is less than that multiple of the throughput of one.
"""

import argparse
import asyncio
import base64
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import torch

from idavlm import RecordDataset
from idavlm.datasets import build_characters
from idavlm.evaluation import load_checkpoint
from idavlm.utils import describe_machine, markdown_table

KEY = "benchmark"
MARGIN = 0.01
"""Two logits that are closer than this may change places by the rounding of sums, which depends on the batch."""

_IDLE_SECONDS = 8.0
"""Time until a server without requests has closed its connections and returned freed memory to the system."""

COLUMNS = ["clients", "requests", "requests/s", "median s", "p95 s", "rows per batch", "processor ms per request"]


@dataclass
class Client:
    """One client: its cast, its question (texts and images in order), and the answer that a single caller gets."""

    number: int
    cast: dict[str, list[Path]]
    question: list[str | Path]
    expected: str = ""
    margin: float = 0.0  # of the largest logit before the second, at the least certain token
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="idavlm-tiny", help="checkpoint with an ID-Former")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all clients together")
    parser.add_argument("--single-seconds", type=float, default=15.0, help="of one client alone")
    parser.add_argument("--photos", action="store_true", help="send the photos with every request instead of a bank")
    parser.add_argument("--stream", action="store_true", help="stream the answers")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--least-speedup", type=float, help="fail below this multiple of one client's throughput")
    parser.add_argument(
        "--data", type=Path, default=Path("runs/serving"), help="folder of the records; drawn if it is new"
    )
    parser.add_argument("--server-cpu", type=int, help="processor of the server (Linux)")
    arguments = parser.parse_args()

    clients = make_clients(arguments)
    print(f"{describe_machine(torch.device('cpu'))}\n")
    with_expected_answers(clients, arguments)
    process, url = start_server(arguments)
    try:
        rows = asyncio.run(measure(clients, url, psutil.Process(process.pid), arguments))
    finally:
        process.terminate()
        status = process.wait(60)
    print(markdown_table(COLUMNS, rows))
    wrong = [text for client in clients for text in client.wrong]
    speedup = float(rows[1][2]) / float(rows[0][2])
    print(f"\n{len(wrong)} answers lost or mixed; throughput x {speedup:.1f}; exit status of the server {status}")
    if wrong or status:
        sys.exit("\n".join(["answers that are lost or differ:", *wrong[:10]]))
    if arguments.least_speedup is not None and speedup < arguments.least_speedup:
        sys.exit(f"throughput x {speedup:.2f} is less than {arguments.least_speedup}")


def make_clients(arguments) -> list[Client]:
    """Clients with one record each, of all tasks."""
    folder = arguments.data
    if not (folder / "test.jsonl").exists():
        build_characters(folder, num_test_records=8 * arguments.clients, num_train_records=8, seed=11)
    samples = [sample for sample in RecordDataset(folder / "test.jsonl") if sample.identities]
    random.Random(0).shuffle(samples)  # the file is sorted by task
    samples = samples[: arguments.clients]
    if len(samples) < arguments.clients:
        sys.exit(f"{folder} has {len(samples)} records of identities; pass --clients {len(samples)} or another --data")
    images = folder / "images"
    clients = []
    for number, sample in enumerate(samples):
        cast = {identity.name: [images / image for image in identity.images] for identity in sample.identities}
        parts = next(message.content for message in sample.messages if message.role == "user")
        question = [images / part.image if part.type == "image" else part.text for part in parts]
        clients.append(Client(number, cast, question))
    return clients


def with_expected_answers(clients: list[Client], arguments) -> None:
    """Answer every question alone, without a server."""
    model, processor = load_checkpoint(arguments.model)
    num_tokens = 0
    for client in clients:
        identities = [{"type": "identity", "name": name, "images": of} for name, of in client.cast.items()]
        parts = [
            {"type": "image", "image": part} if isinstance(part, Path) else {"type": "text", "text": part}
            for part in client.question
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*identities, *parts]}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(output.logits).topk(2).values
        client.margin = float((best[:, 0] - best[:, 1]).min())
        answer = output.sequences[0, inputs["input_ids"].shape[1] :]
        num_tokens += len(answer)
        client.expected = processor.decode(answer, skip_special_tokens=True).strip()
    close = [client.number for client in clients if client.margin < MARGIN]
    if close:
        print(f"answers of clients {close} hang on logits closer than {MARGIN}: rounding may change them\n")
    different = len({client.expected for client in clients})
    print(f"{len(clients)} clients, {different} different answers, {num_tokens / len(clients):.1f} tokens per answer\n")


def start_server(arguments) -> tuple[subprocess.Popen, str]:
    """Start the server and return it with its URL."""
    limits = ["--max-batch-size", str(arguments.max_batch_size), "--max-banks", str(arguments.clients)]
    command = [sys.executable, "-m", "idavlm.cli.main", "serve", "--model", arguments.model, "--port", "0", *limits]
    environment = {**os.environ, "IDAVLM_API_KEY": KEY}
    command += ["--model-name", "model", "--max-requests", str(2 * arguments.clients)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    if arguments.server_cpu is not None:
        os.sched_setaffinity(process.pid, {arguments.server_cpu})
    return process, process.stdout.readline().split()[-1]


async def measure(clients: list[Client], url: str, server: psutil.Process, arguments) -> list[list]:
    """One client, then all clients. Returns the rows of the table."""
    limits = httpx.Limits(max_connections=2 * len(clients), max_keepalive_connections=2 * len(clients))
    async with openai.AsyncOpenAI(
        base_url=url, api_key=KEY, http_client=httpx.AsyncClient(limits=limits, timeout=120), max_retries=0
    ) as api:
        if not arguments.photos:
            for client in clients:
                identities = [{"name": name, "images": list(map(data_url, of))} for name, of in client.cast.items()]
                await api.post(
                    "/identities", body={"name": f"cast-{client.number}", "identities": identities}, cast_to=object
                )
        await run_clients(api, clients, 1.0, arguments)  # a warm-up
        for client in clients:
            client.seconds.clear()
        rows, memory = [], []
        for number, seconds in ((1, arguments.single_seconds), (len(clients), arguments.seconds)):
            memory.append((server.num_fds(), server.memory_info().rss >> 20))
            before, work = await batches(api), sum(server.cpu_times()[:2])
            start = time.perf_counter()
            if number == 1:
                end = start + seconds
                for client in itertools.cycle(clients):
                    if time.perf_counter() > end:
                        break
                    await ask_once(api, client, arguments)
            else:
                await run_clients(api, clients, seconds, arguments)
            passed = time.perf_counter() - start
            after, work = await batches(api), sum(server.cpu_times()[:2]) - work
            times = sorted(second for client in clients for second in client.seconds)
            per_batch = (after["sum"] - before["sum"]) / (after["count"] - before["count"])
            p95 = times[int(0.95 * (len(times) - 1))]
            row = [number, len(times), f"{len(times) / passed:.1f}", f"{statistics.median(times):.3f}"]
            rows.append([*row, f"{p95:.3f}", f"{per_batch:.1f}", f"{1000 * work / len(times):.1f}"])
            for client in clients:
                client.seconds.clear()
        memory.append((server.num_fds(), server.memory_info().rss >> 20))
        if not arguments.photos:
            for client in clients:
                await api.delete(f"/identities/cast-{client.number}", cast_to=object)
    await asyncio.sleep(_IDLE_SECONDS)
    memory.append((server.num_fds(), server.memory_info().rss >> 20))
    print(
        "open files and resident megabytes of the server before the table, between its rows, after it, and without "
        f"clients and banks: {memory}\n"
    )
    return rows


async def run_clients(api, clients: list[Client], seconds: float, arguments) -> None:
    end = time.perf_counter() + seconds
    await asyncio.gather(*(ask_until(api, client, end, arguments) for client in clients))


async def ask_until(api, client: Client, end: float, arguments) -> None:
    """Ask the question of a client again and again, and compare the answers."""
    while time.perf_counter() < end:
        await ask_once(api, client, arguments)


async def ask_once(api, client: Client, arguments) -> None:
    body = body_of(client, arguments)
    start = time.perf_counter()
    try:
        if arguments.stream:
            chunks = [chunk async for chunk in await api.chat.completions.create(**body, stream=True)]
            answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            answer = (await api.chat.completions.create(**body)).choices[0].message.content
    except openai.OpenAIError as error:
        client.wrong.append(f"client {client.number}: {type(error).__name__}: {error}")
    else:
        client.seconds.append(time.perf_counter() - start)
        if answer != client.expected and client.margin >= MARGIN:
            client.wrong.append(f"client {client.number}: {answer!r} in place of {client.expected!r}")


def body_of(client: Client, arguments) -> dict:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(part)}}
        if isinstance(part, Path)
        else {"type": "text", "text": part}
        for part in client.question
    ]
    extra = {"bank": f"cast-{client.number}"}
    if arguments.photos:
        extra = {}
        photos = [
            {"type": "identity", "name": name, "images": list(map(data_url, of))} for name, of in client.cast.items()
        ]
        content = [*photos, *content]
    messages = [{"role": "user", "content": content}]
    return {"model": "model", "messages": messages, "max_tokens": arguments.max_new_tokens, "extra_body": extra}


async def batches(api) -> dict[str, float]:
    """Number of batches and of their rows so far, from the metrics of the server."""
    response = await api._client.get(f"{str(api.base_url).removesuffix('/v1/')}/metrics", headers=api.auth_headers)
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    return {name: float(lines[f"idavlm_batch_rows_{name}"]) for name in ("sum", "count")}


def data_url(file: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode()


if __name__ == "__main__":
    main()
