"""``idavlm web``: a web page on which people upload a cast and ask about images."""

import argparse
from pathlib import Path

from idavlm.cli.arguments import name, positive_int
from idavlm.cli.model_arguments import add_model_arguments, check_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", type=name, help="address to listen on; by default this computer")
    parser.add_argument("--port", default=7860, type=positive_int, help="port; by default 7860")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="maximum length of an answer")
    parser.add_argument("--max-upload", default="20mb", type=name, help="largest file of an upload; by default 20mb")
    parser.add_argument("--no-examples", action="store_true", help="leave out the examples of drawn characters")


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    check_model_arguments(arguments)
    try:
        from gradio import Blocks  # noqa: F401
    except ImportError as error:
        raise ValueError("idavlm web needs gradio; install it by pip install 'idavlm[web]'.") from error
    from idavlm.inference import BatchingEngine
    from idavlm.inference.web_page import build_web_page, drawn_examples

    model, processor = load_model(arguments)
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
