"""``idavlm serve``: an OpenAI-compatible server of one model, with identities and named banks."""

import argparse
import ipaddress
import os
from pathlib import Path

from idavlm.cli.arguments import name, path, positive_int
from idavlm.cli.model_arguments import add_model_arguments, check_model_arguments, load_model

KEY_VARIABLE = "IDAVLM_API_KEY"
"""Environment variable of the API key. A key among the arguments would be visible to other users of the machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument("--model-name", type=name, help="name of the model in requests; by default that of --model")
    parser.add_argument(
        "--host", default="127.0.0.1", type=name, help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--port", default=8000, type=_port, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key-file", type=path, help=f"file with one API key per line; without it, {KEY_VARIABLE} may hold a key"
    )
    parser.add_argument("--image-root", type=path, help="folder of image files that requests may name (default: none)")
    storing = parser.add_mutually_exclusive_group()
    storing.add_argument(
        "--store",
        type=path,
        metavar="DIR",
        help='folder of the banks that are created with "store": true (default: none)',
    )
    storing.add_argument(
        "--no-store", action="store_true", help="refuse banks: no photo or feature outlives its request"
    )
    batching = parser.add_argument_group("batching")
    batching.add_argument(
        "--max-batch-size", type=positive_int, default=32, help="rows of a batch (default: %(default)s)"
    )
    batching.add_argument(
        "--max-batch-tokens", type=positive_int, default=65536, help="rows times longest row (default: %(default)s)"
    )
    batching.add_argument(
        "--max-wait-ms", type=float, default=20.0, help="wait for requests in preparation (default: %(default)s)"
    )
    limits = parser.add_argument_group("limits")
    for option, default, text in (
        ("--max-requests", 256, "requests at a time"),
        ("--max-body-mb", 32, "megabytes of a request"),
        ("--max-images", 32, "images of a request"),
        ("--max-megapixels", 64, "megapixels of all images of a request"),
        ("--max-identities", 16, "identities of a request or a bank"),
        ("--max-banks", 100, "banks"),
        ("--max-prompt-tokens", 8192, "tokens of a prompt"),
        ("--max-new-tokens", 1024, "tokens of an answer"),
    ):
        limits.add_argument(option, type=positive_int, default=default, help=f"{text} (default: %(default)s)")
    for option, seconds, text in (
        ("--body-timeout", 30.0, "until a request has arrived"),
        ("--deadline", 120.0, "until a request fails"),
        ("--stop-timeout", 60.0, "for running requests after SIGTERM"),
    ):
        limits.add_argument(option, type=float, default=seconds, help=f"seconds {text} (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Load the model and serve until SIGTERM or Ctrl-C."""
    keys = _api_keys(arguments.api_key_file)
    if not keys and not _is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host} lets other machines in, but there is no API key; set {KEY_VARIABLE} or pass "
            "--api-key-file."
        )
    check_model_arguments(arguments)
    # After the checks, because these imports take seconds.
    try:
        from idavlm.inference.server import ServerSettings, create_app, listen, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"idavlm serve needs {error.name}; install it by pip install 'idavlm[serve]'.") from error
    settings = ServerSettings(
        model_name=arguments.model_name or Path(arguments.model).name,
        api_keys=keys,
        image_root=arguments.image_root,
        allow_banks=not arguments.no_store,
        max_requests=arguments.max_requests,
        max_body_bytes=arguments.max_body_mb * 2**20,
        max_bytes_in_flight=max(256, 4 * arguments.max_body_mb) * 2**20,
        max_images=arguments.max_images,
        max_pixels=arguments.max_megapixels * 1_000_000,
        max_identities=arguments.max_identities,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        body_timeout=arguments.body_timeout,
        deadline=arguments.deadline,
        stop_timeout=arguments.stop_timeout,
    )
    listener = listen(arguments.host, arguments.port)

    import logging

    from idavlm.inference import BankStore, BatchingEngine

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("idavlm").setLevel(logging.INFO)
    model, processor = load_model(arguments)
    engine = BatchingEngine(
        model,
        processor,
        max_batch_size=arguments.max_batch_size,
        max_batch_tokens=arguments.max_batch_tokens,
        max_wait=arguments.max_wait_ms / 1000,
    )
    banks = BankStore(engine, folder=arguments.store, max_banks=arguments.max_banks)
    gate = create_app(engine, banks, settings)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{settings.model_name} on {model.device}: http://{host}:{port}/v1", flush=True)
    serve(gate, listener=listener)


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between 0 and 65535")
    return port


def _api_keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ValueError(f"--api-key-file {file} holds no key; write one per line.")
    return keys


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
