"""A local OpenAI-compatible endpoint with failures on demand."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """Answers each request by ``reply(content)``, after the planned faults.

    Faults, one per request: a status (429, 500 ...), ``"hang"``, ``"cut"`` (truncated JSON), ``"short"`` (fewer
    bytes than announced), ``"shape"`` (JSON without the expected fields), ``"drop"`` (the connection is closed).
    """

    def __init__(self, reply, faults=(), hang: float = 5.0):
        self.reply, self.faults, self.hang = reply, list(faults), hang
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
            self.asked.append(content)
            self.headers.append(dict(request.headers))
            self.times.append(time.monotonic())
        if fault == "hang":
            time.sleep(self.hang)
        if fault in ("hang", "drop"):
            request.close_connection = True
            return
        status = fault if isinstance(fault, int) else 200
        reply = None if status != 200 else self.reply(content)
        message = {"role": "assistant", **(reply if isinstance(reply, dict) else {"content": reply})}
        data = json.dumps({"choices": [{"message": message}]} if fault != "shape" else {"error": None}).encode()
        data = data[: len(data) // 2] if fault == "cut" else data
        request.send_response(status)
        if status == 429:
            request.send_header("Retry-After", "0")
        request.send_header("Content-Length", str(len(data) + (20 if fault == "short" else 0)))
        request.end_headers()
        request.wfile.write(data)
        if fault == "short":
            request.close_connection = True
        if fault is None:
            with self._lock:
                self.answered.append(content)
