"""An ID-Former class of one's own in place of :class:`idavlm.IDFormer`, by its import path."""

import importlib
import inspect
import sys

from idavlm.modules import IDFormer

SET_BY_MODEL = ("hidden_size", "num_queries", "num_heads", "vision_hidden_size", "output_size", "attn_implementation")
"""Arguments that the model passes to the constructor of every ID-Former."""


def import_id_former(path: str) -> type[IDFormer]:
    """Import an ID-Former class and check that a model can use it.

    Args:
        path: import path, such as ``"my_package.MyIDFormer"``. The package must be on the Python path.

    Raises:
        ValueError: the class cannot be imported, is no subclass of :class:`idavlm.IDFormer`, or its constructor does
            not take the arguments that a model passes.
    """
    _import_module(path)
    return find_id_former(path)


def find_id_former(path: str | None) -> type[IDFormer]:
    """The class of the import path ``path``, whose module has been imported; :class:`idavlm.IDFormer` for None.

    The module is not imported here, because ``path`` may come from a checkpoint, and a checkpoint must not choose which
    code is run.

    Raises:
        ValueError: see :func:`import_id_former`; or the module has not been imported.
    """
    if path is None:
        return IDFormer
    module_name, _, name = path.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None:
        raise ValueError(
            f"id_former_class={path!r} is code that has not been imported; if you trust it, run "
            f"`import {module_name or path}` before the model is built or loaded."
        )
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        raise ValueError(f"id_former_class={path!r}: the module {module_name} has no class {name!r}.")
    if not issubclass(found, IDFormer):
        raise ValueError(f"id_former_class={path!r} is no subclass of idavlm.IDFormer; derive it from that class.")
    parameters = inspect.signature(found.__init__).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [argument for argument in SET_BY_MODEL if argument not in parameters]
    if missing and not takes_any:
        raise ValueError(
            f"id_former_class={path!r}: its constructor does not take {', '.join(missing)}; accept **options and pass "
            "them on to IDFormer.__init__."
        )
    return found


def _import_module(path: str) -> None:
    module_name = path.rpartition(".")[0]
    if not module_name:
        raise ValueError(f"id_former_class={path!r} names no module; pass a path such as 'my_package.MyIDFormer'.")
    try:
        importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"id_former_class={path!r} cannot be imported ({error}); is its folder in the environment variable "
            "PYTHONPATH?"
        ) from error
