"""Run a function in a forked process, so that its memory can be measured from a clean start."""

import json
import os
from collections.abc import Callable
from typing import Any


def run_forked(function: Callable[[], Any]) -> Any:
    """The result of ``function``, a JSON value, from a process that ends afterwards.

    Raises:
        SystemExit: the process failed; it has printed its error.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, json.dumps(function()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as results:
        content = results.read()
    if os.waitpid(process, 0)[1]:
        raise SystemExit("the measured process failed; its error is above.")
    return json.loads(content)
