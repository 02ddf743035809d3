"""The OpenAI-compatible server. It needs the extra ``serve``: ``pip install 'idavlm[serve]'``."""

from idavlm.inference.server.app import create_app
from idavlm.inference.server.errors import ApiError
from idavlm.inference.server.gate import Gate
from idavlm.inference.server.metrics import Metrics
from idavlm.inference.server.process import GracefulServer, listen, serve
from idavlm.inference.server.schema import BankRequest, ChatRequest
from idavlm.inference.server.settings import ServerSettings

__all__ = [
    "ApiError",
    "BankRequest",
    "ChatRequest",
    "Gate",
    "GracefulServer",
    "Metrics",
    "ServerSettings",
    "create_app",
    "listen",
    "serve",
]
