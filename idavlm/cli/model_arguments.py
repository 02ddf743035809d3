"""The arguments that name the model of a command, and the model that they name."""

import argparse

from idavlm.cli.arguments import name, path

DEFAULT_MODEL = "idavlm-tiny"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--id-former``, ``--id-former-class``, ``--device`` and ``--dtype``."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        type=name,
        help="checkpoint of idavlm, or a vision-language model of transformers (default: %(default)s, which is part of "
        "the package and knows drawn characters only)",
    )
    parser.add_argument("--id-former", type=path, help="folder of save_id_former; attaches it to --model")
    add_class_argument(parser)
    parser.add_argument("--device", type=name, help="device of the model; by default cuda if available, else cpu")
    parser.add_argument("--dtype", type=name, help="type of the weights, for example bfloat16")


def add_class_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--id-former-class``."""
    parser.add_argument(
        "--id-former-class",
        metavar="PATH",
        type=name,
        help="import path of an ID-Former class of your own, such as my_package.MyIDFormer, that the "
        "checkpoint was trained with",
    )


def load_model(arguments: argparse.Namespace) -> tuple:
    """Load the model and its processor. The imports take seconds: call it after all checks of arguments.

    Raises:
        ValueError: ``--id-former`` without ``--model``; and see :func:`idavlm.evaluation.load_checkpoint`.
    """
    check_model_arguments(arguments)
    import torch

    from idavlm.evaluation import load_checkpoint

    device = arguments.device if arguments.device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    classes = {"id_former": arguments.id_former, "id_former_class": arguments.id_former_class}
    return load_checkpoint(arguments.model, **classes, device=device, dtype=arguments.dtype)


def check_model_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError if ``--id-former`` was passed without a model to attach it to."""
    if arguments.id_former is not None and arguments.model == DEFAULT_MODEL:
        raise ValueError(f"--id-former {arguments.id_former} is attached to a model; pass that model as --model.")
