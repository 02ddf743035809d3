"""The folder of a run: its record, log and output; and the process that fills it."""

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from idavlm.data.errors import quote
from idavlm.evaluation.metrics_file import RunMetrics, read_metrics
from idavlm.utils import read_json_object, write_text

STATES = ("new", "running", "killed", "failed", "finished")
"""States of a run: never started; its program runs; its program was ended from outside; exit status other than 0, or no
valid metrics; finished with metrics."""

LOG_LINES = 15
"""Lines at the end of the log of a failed run that are shown."""


class RunFolder:
    """The folder of a run.

    ``run.json`` holds the settings, the command, git revisions, package versions, times, state and exit status; it is
    always whole. ``log.txt`` holds what the program printed, ``output/`` its files. A run is finished only if
    ``run.json`` says so, which is written last.

    Args:
        folder: the folder; it need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.output = self.folder / "output"
        self.log = self.folder / "log.txt"
        self._process: subprocess.Popen | None = None
        self._stopped = False

    @property
    def record(self) -> dict[str, Any]:
        """Content of ``run.json``; {} for a new run."""
        path = self.folder / "run.json"
        return read_json_object(path) if path.exists() else {}

    @property
    def state(self) -> str:
        """One of :data:`STATES`."""
        record = self.record
        if not record:
            return "new"
        state = record.get("state")
        if state in ("finished", "failed"):
            return state
        return "running" if self._is_locked() else "killed"

    def metrics(self) -> RunMetrics:
        """The metrics of a finished run."""
        return read_metrics(self.output)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a finished run that had other settings.

        Raises:
            ValueError: with the options that differ.
        """
        if self.state != "finished":
            return
        before = self.record.get("settings", {})
        now = json.loads(json.dumps(dict(settings)))
        changed = [
            f"{name} was {quote(before.get(name, 'not set'))} and is {quote(now.get(name, 'not set'))}"
            for name in {**before, **now}
            if before.get(name, ...) != now.get(name, ...)
        ]
        if changed:
            raise ValueError(
                f"{self.folder} is finished, but the study has changed since ({'; '.join(changed)}). Set another "
                "folder with out, or remove this one to run it again."
            )

    def end_of_log(self, lines: int = LOG_LINES) -> str:
        """The last lines of the log."""
        if not self.log.exists():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def execute(
        self,
        command: list[str],
        *,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        keep_output: bool = False,
    ) -> str:
        """Run the program, and wait for its end.

        Args:
            command: the command; it writes into :attr:`output`.
            settings: what the run is made of; stored, and compared when the study is started again.
            facts: further entries of ``run.json``.
            environment: environment variables that are set for the program.
            keep_output: keep the files of an attempt that was killed.

        Returns:
            ``"finished"`` or ``"failed"``; ``"killed"`` after :meth:`stop`.

        Raises:
            ValueError: a process of an earlier attempt still writes into the folder, and does not end.
        """
        before = self.record
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(before) as lock:
            if not keep_output:
                shutil.rmtree(self.output, ignore_errors=True)
            self.output.mkdir(exist_ok=True)
            record = {
                "settings": dict(settings),
                **facts,
                "command": command,
                "environment": dict(environment or {}),
                "attempts": before.get("attempts", 0) + 1,
                "started": _now(),
                "state": "running",
            }
            self._write(record)
            start = time.monotonic()
            with self.log.open("ab" if keep_output else "wb") as log:
                process = self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,  # its own process group, which can be ended as a whole
                    pass_fds=(lock,),  # the lock is held as long as the program runs, even if this process is killed
                )
                self._write(record | {"process": process.pid, "host": platform.node()})
                if self._stopped:  # before the process was known
                    end_process_group(process.pid)
                try:
                    status = process.wait()
                finally:
                    end_process_group(process.pid)
                    process.wait()
            if self._stopped:
                return "killed"
            record |= {"ended": _now(), "seconds": time.monotonic() - start, "exit_status": status}
            problem = _describe_exit(status) if status else self._problem_with_metrics()
            state = "failed" if problem else "finished"
            self._write(record | {"state": state} | ({"problem": problem} if problem else {}))
            return state

    def stop(self) -> None:
        """End the program of :meth:`execute`, which another thread waits for. The run counts as killed."""
        self._stopped = True
        if self._process is not None:
            end_process_group(self._process.pid)

    def _problem_with_metrics(self) -> str | None:
        try:
            self.metrics()
        except (OSError, ValueError) as error:
            return f"the program wrote no valid metrics.json into --out ({error})"
        return None

    def _write(self, record: Mapping[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")

    def _is_locked(self) -> bool:
        import fcntl

        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @contextmanager
    def _lock(self, before: Mapping[str, Any]):
        """Hold the lock of the folder. A program that outlived a killed study holds it still, and is ended."""
        import fcntl

        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            for attempt in range(100):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # Not at the first attempt, because a report that asks for the state holds the lock for a moment.
                    if attempt == 1 and before.get("process") and before.get("host") == platform.node():
                        end_process_group(before["process"])
                    time.sleep(0.1)
            else:
                raise ValueError(
                    f"{self.folder} is in use by another process, perhaps of an earlier start of the study "
                    f"(process {before.get('process', 'unknown')}); end it first."
                )
            yield descriptor
        finally:
            os.close(descriptor)


def end_process_group(process: int) -> None:
    """Kill the processes of a group that are left; none is no error."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _describe_exit(status: int) -> str:
    if status > 0:
        return f"exit status {status}"
    with suppress(ValueError):
        return f"ended by {signal.Signals(-status).name}"
    return f"ended by signal {-status}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
