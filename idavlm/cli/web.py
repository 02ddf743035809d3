"""``idavlm web``: a web page on which people upload a cast and ask about images."""

import argparse
from pathlib import Path

from idavlm.cli.arguments import name, path, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--model",
        default="idavlm-tiny",
        type=name,
        help="checkpoint of idavlm, or a vision-language model of transformers; by default idavlm-tiny",
    )
    parser.add_argument("--id-former", type=path, help="folder of save_id_former; attaches it to --model")
    parser.add_argument("--host", default="127.0.0.1", type=name, help="address to listen on; by default this computer")
    parser.add_argument("--port", default=7860, type=positive_int, help="port; by default 7860")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="maximum length of an answer")
    parser.add_argument("--max-upload", default="20mb", type=name, help="largest file of an upload; by default 20mb")
    parser.add_argument("--no-examples", action="store_true", help="leave out the examples of drawn characters")
    parser.add_argument("--device", type=name, help="device of the model; by default cuda if available, else cpu")


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    import torch

    from idavlm.evaluation import load_checkpoint
    from idavlm.inference import BatchingEngine
    from idavlm.inference.web_page import build_web_page, drawn_examples

    device = arguments.device if arguments.device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_checkpoint(arguments.model, id_former=arguments.id_former, device=device)
    with BatchingEngine(model, processor) as engine:
        page = build_web_page(
            engine,
            title=f"idavlm: {Path(arguments.model).name}",
            examples=() if arguments.no_examples else drawn_examples(),
            max_new_tokens=arguments.max_new_tokens,
        )
        page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            max_file_size=arguments.max_upload,
            share=False,
            footer_links=[],
        )
