"""Throughput of `idavlm serve`: many clients, each with a cast of its own, against one client that waits.

    python -m benchmarks.serving --model runs/train_idformer/characters/seed-0/with-id-former --prompt-prefix "\\n"

The server is a process of its own. Each client creates a bank of its cast (or sends the photos with every request,
--photos) and asks where the identities of its scenes are. First one client asks one request after the other, then all
clients ask at the same time, against the same server. Every answer is compared with the answer of `idavlm.ask` to the
same question alone. Requests per second depend on other work on the machine; the time that the processor spends on a
request does not. The program fails if an answer is lost or differs, and, with --least-speedup, if the throughput of
all clients together is less than that multiple of the throughput of one.
"""

import argparse
import asyncio
import base64
import itertools
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil

from idavlm import RecordDataset, ask
from idavlm.datasets import build_characters
from idavlm.evaluation import load_checkpoint
from idavlm.utils import describe_machine, markdown_table

KEY = "benchmark"
COLUMNS = ["clients", "requests", "requests/s", "median s", "p95 s", "rows per batch", "processor ms per request"]


@dataclass
class Question:
    """A question about a scene and a cast, and the answer that a single caller gets."""

    text: str
    scene: Path
    expected: str = ""


@dataclass
class Client:
    """One client: its cast and its questions."""

    number: int
    cast: dict[str, list[Path]]
    questions: list[Question]
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
    parser.add_argument("--question", default="Where is {name}?")
    parser.add_argument("--prompt-prefix", default="", help=r"text before a question; \n is a line break")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--least-speedup", type=float, help="fail below this multiple of one client's throughput")
    parser.add_argument("--data", type=Path, default=Path("runs/serving"), help="folder of the drawn cast")
    parser.add_argument("--server-cpu", type=int, help="processor of the server (Linux)")
    arguments = parser.parse_args()

    clients = make_clients(arguments)
    print(f"{describe_machine('cpu')}\n")
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
    """Clients with casts and scenes that no other client has, as far as the drawn data has that many."""
    folder = build_characters(
        arguments.data,
        num_train=8,
        num_test=max(arguments.clients, 16),
        num_train_scenes=8,
        num_test_scenes=4 * arguments.clients,
        num_train_records=8,
        num_test_records=16 * arguments.clients,
        num_general=4,
        num_general_records=4,
        seed=11,
    )
    found: dict[Path, dict[str, list[Path]]] = {}
    for sample in RecordDataset(folder / "test.jsonl"):
        images = sample.message_images
        if len(images) == 1 and "scenes" in images[0] and len(sample.identities) > 1:
            cast = {each.name: [folder / "images" / image for image in each.images] for each in sample.identities}
            found.setdefault(folder / "images" / images[0], cast)
    scenes = itertools.cycle(found.items())
    prefix = arguments.prompt_prefix.replace("\\n", "\n")
    clients = []
    for number in range(arguments.clients):
        scene, cast = next(scenes)
        questions = [Question(prefix + arguments.question.format(name=name), scene) for name in cast]
        clients.append(Client(number, cast, questions))
    return clients


def with_expected_answers(clients: list[Client], arguments) -> None:
    """Ask every question alone, without a server."""
    model, processor = load_checkpoint(arguments.model)
    for client in clients:
        for question in client.questions:
            question.expected = ask(
                model,
                processor,
                question.text,
                images=[question.scene],
                identities=client.cast,
                max_new_tokens=arguments.max_new_tokens,
            )
    answers = [question.expected for client in clients for question in client.questions]
    print(f"{len(clients)} clients, {len(answers)} questions, {len(set(answers))} different answers\n")


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
        for several, seconds in ((clients[:1], arguments.single_seconds), (clients, arguments.seconds)):
            memory.append((server.num_fds(), server.memory_info().rss >> 20))
            before, work = await batches(api), sum(server.cpu_times()[:2])
            start = time.perf_counter()
            await run_clients(api, several, seconds, arguments)
            passed = time.perf_counter() - start
            after, work = await batches(api), sum(server.cpu_times()[:2]) - work
            times = sorted(second for client in several for second in client.seconds)
            per_batch = (after["sum"] - before["sum"]) / (after["count"] - before["count"])
            p95 = times[int(0.95 * (len(times) - 1))]
            row = [len(several), len(times), f"{len(times) / passed:.1f}", f"{statistics.median(times):.3f}"]
            rows.append([*row, f"{p95:.3f}", f"{per_batch:.1f}", f"{1000 * work / len(times):.1f}"])
            for client in several:
                client.seconds.clear()
        memory.append((server.num_fds(), server.memory_info().rss >> 20))
        print(f"open files and resident megabytes of the server before, between and after: {memory}\n")
    return rows


async def run_clients(api, clients: list[Client], seconds: float, arguments) -> None:
    end = time.perf_counter() + seconds
    await asyncio.gather(*(ask_until(api, client, end, arguments) for client in clients))


async def ask_until(api, client: Client, end: float, arguments) -> None:
    """Ask the questions of a client in turn, and compare the answers."""
    bodies = [body_of(client, question, arguments) for question in client.questions]
    for question, body in itertools.cycle(zip(client.questions, bodies, strict=True)):
        if time.perf_counter() > end:
            return
        start = time.perf_counter()
        try:
            if arguments.stream:
                chunks = [chunk async for chunk in await api.chat.completions.create(**body, stream=True)]
                answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            else:
                answer = (await api.chat.completions.create(**body)).choices[0].message.content
        except openai.OpenAIError as error:
            client.wrong.append(f"client {client.number}: {type(error).__name__}: {error}")
            return
        client.seconds.append(time.perf_counter() - start)
        if answer != question.expected:
            client.wrong.append(f"client {client.number}: {question.text!r}: {answer!r} != {question.expected!r}")


def body_of(client: Client, question: Question, arguments) -> dict:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(question.scene)}},
        {"type": "text", "text": question.text},
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
