"""A server on this machine that speaks Ollama's wire format, for the real client to talk to."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
import hashlib
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
import json
import socket
import ssl
import struct
import sys
import threading
from types import TracebackType
from typing import Any
from typing import Literal


DEFAULT_MODELS = ("gemma3:4b",)
_CREATED_AT = "2026-08-21T10:00:00.000000Z"


@dataclass(frozen=True)
class Fault:
    """What a server that misbehaves sends in place of an answer.

    Attributes:
        status: HTTP status.
        body: The body; a str is sent as it is, anything else but bytes as JSON.
        content_type: The body's content type.
        headers: Headers beside the content type and the length.
        drop: Whether the connection is reset before the status line or inside the body.
        delay: Seconds of silence before anything is sent.
        trickle: Whether the headers or the body come byte by byte, and never to an end.
        interval: Seconds between two bytes that trickle.
        endless: Whether the body comes again and again, as fast as the client reads.

    Closing the server ends all that waits.
    """

    status: int = 200
    body: Any = b""
    content_type: str = "application/json; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Literal["", "before", "inside"] = ""
    delay: float = 0.0
    trickle: Literal["", "headers", "body"] = ""
    interval: float = 0.05
    endless: bool = False

    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        return text.encode()


# A reply is a content, fields that differ from a good response's, or a fault.
Reply = str | Mapping[str, Any] | Fault
Replies = Sequence[Reply] | Callable[[dict[str, Any]], Reply]


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class OllamaServer:
    """An Ollama server in this process, for the time of a ``with`` block.

    Args:
        replies: One for each chat request, in their order, or a function of the decoded request.
        models: Names of the models it has, with their tags.
        capabilities: What a model can do, where that is not ``["completion"]``; None for a server
            that does not tell.
        faults: What a path answers instead, as in ``{"/api/tags": Fault(500)}``.
        context_length: What a loaded model really got; default: what its last chat asked for.
        trained: The context length that the models were trained for.
        port: Where it listens; default: any free port.

    Attributes:
        requests: Everything it was asked, in the order of arrival.

    Example:

        .. code-block:: python

            with OllamaServer(['{"prompts": ["a calm answer"]}']) as server:
                OllamaProvider("gemma3:4b", host=server.url).check()
    """

    def __init__(
        self,
        replies: Replies = (),
        *,
        models: Sequence[str] = DEFAULT_MODELS,
        faults: Mapping[str, Fault] | None = None,
        context_length: int | None = None,
        capabilities: Mapping[str, Sequence[str] | None] | None = None,
        trained: int = 131_072,
        port: int = 0,
    ) -> None:
        self.replies = replies
        self.models = tuple(models)
        self.faults = dict(faults or {})
        self.context_length = context_length
        self.capabilities = dict(capabilities or {})
        self.trained = trained
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._n_replied = 0
        self._loaded: dict[str, int] = {}
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.ollama = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def use_tls(self, context: ssl.SSLContext) -> None:
        """Takes only TLS connections from now on."""
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )

    @property
    def chats(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests."""
        return [request.body for request in self.requests if request.path == "/api/chat"]

    @staticmethod
    def digest(model: str) -> str:
        """The digest under which the server lists a model."""
        return hashlib.sha256(model.encode()).hexdigest()

    def __enter__(self) -> OllamaServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: Request) -> Fault | dict[str, Any] | str:
        """The answer to a request: a fault, a JSON body or a text."""
        with self._lock:
            self.requests.append(request)
        if request.path in self.faults:
            return self.faults[request.path]
        if (request.method, request.path) == ("GET", "/"):
            return "Ollama is running"
        routes: dict[tuple[str, str], Callable[[Any], Fault | dict[str, Any]]] = {
            ("GET", "/api/version"): lambda _: {"version": "0.32.9"},
            ("GET", "/api/tags"): lambda _: {"models": [self._listed(m) for m in self.models]},
            ("GET", "/api/ps"): lambda _: {"models": self._running()},
            ("POST", "/api/show"): self._show,
            ("POST", "/api/chat"): self._chat,
        }
        route = routes.get((request.method, request.path))
        return route(request.body) if route else Fault(404, "404 page not found", "text/plain")

    def _resolved(self, model: str) -> str | None:
        """The model of a name: in any case, and with the registry's name before it or not."""
        name = model.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
        return next((m for m in self.models if m in (name, f"{name}:latest")), None)

    def _listed(self, model: str) -> dict[str, Any]:
        return {
            "name": model,
            "model": model,
            "modified_at": _CREATED_AT,
            "size": 3_338_801_804,
            "digest": self.digest(model),
            "details": _DETAILS,
        }

    def _running(self) -> list[dict[str, Any]]:
        with self._lock:
            loaded = dict(self._loaded)
        return [
            {
                **self._listed(model),
                "expires_at": _CREATED_AT,
                "size_vram": 3_338_801_804,
                "context_length": self.context_length or asked,
            }
            for model, asked in loaded.items()
        ]

    def _show(self, body: dict[str, Any]) -> Fault | dict[str, Any]:
        name = self._resolved(body["model"])
        if name is None:
            return Fault(404, {"error": f"model '{body['model']}' not found"})
        capabilities = self.capabilities.get(name, ["completion"])
        return {
            "modelfile": f"FROM {body['model']}",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": {**_DETAILS, "family": "bert" if "embed" in name else "gemma3"},
            "model_info": {
                "general.architecture": "gemma3",
                "gemma3.context_length": self.trained,
            },
            "modified_at": _CREATED_AT,
            **({} if capabilities is None else {"capabilities": capabilities}),
        }

    def _chat(self, body: dict[str, Any]) -> Fault | dict[str, Any]:
        name = self._resolved(body["model"])
        if name is None:
            return Fault(404, {"error": f"model '{body['model']}' not found"})
        with self._lock:
            self._loaded[name] = body["options"]["num_ctx"]
            if body["keep_alive"] == 0:
                del self._loaded[name]
        reply = self._next_reply(body)
        if isinstance(reply, Fault):
            return reply
        fields = {"message": _message(reply)} if isinstance(reply, str) else dict(reply)
        return {
            "model": body["model"],
            "created_at": _CREATED_AT,
            "message": _message(""),
            "done": True,
            "done_reason": "stop",
            "total_duration": 1_500_000_000,
            "load_duration": 500_000_000,
            "prompt_eval_count": 120,
            "prompt_eval_duration": 400_000_000,
            "eval_count": 30,
            "eval_duration": 600_000_000,
            **fields,
        }

    def _next_reply(self, body: dict[str, Any]) -> Reply:
        if callable(self.replies):
            return self.replies(body)
        with self._lock:
            i = self._n_replied
            self._n_replied += 1
        if i < len(self.replies):
            return self.replies[i]
        return Fault(500, {"error": f"the test has no reply to chat request {i}"})


_DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "gemma3",
    "families": ["gemma3"],
    "parameter_size": "4.3B",
    "quantization_level": "Q4_K_M",
}


def _message(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


class _Server(ThreadingHTTPServer):
    # Closing waits for the handlers: no socket outlives the test.
    daemon_threads = False
    ollama: OllamaServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that ran out of patience is part of the tests, any other error is not.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._serve(json.loads(self.rfile.read(length)))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, body: Any) -> None:
        request = Request(self.command, self.path, dict(self.headers), body)
        answer = self.server.ollama.answer(request)
        if isinstance(answer, str):
            answer = Fault(200, answer, "text/plain; charset=utf-8")
        elif not isinstance(answer, Fault):
            answer = Fault(200, answer)
        self._send(answer)

    def _send(self, answer: Fault) -> None:
        self.server.ollama.closing.wait(answer.delay)
        if answer.drop == "before":
            self._reset()
        elif answer.trickle == "headers":
            self._trickle(b"HTTP/1.1 200 OK\r\nX-Patience: " + b"a" * 10_000, answer.interval)
        elif answer.trickle == "body":
            self._send_head(answer, {"Content-Length": "10000"})
            self._trickle(answer.payload().ljust(10_000), answer.interval)
        elif answer.endless:
            self._send_head(answer, {"Transfer-Encoding": "chunked"})
            self._repeat(answer.payload())
        else:
            payload = answer.payload()
            self._send_head(answer, {"Content-Length": str(len(payload))})
            self.wfile.write(payload[: len(payload) // 2] if answer.drop else payload)
            if answer.drop:
                self._reset()

    def _send_head(self, answer: Fault, framing: Mapping[str, str]) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        # Idle connections would outlive the tests whose clients are not closed.
        for name, value in {**framing, "Connection": "close", **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _trickle(self, data: bytes, interval: float) -> None:
        self.close_connection = True
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.ollama.closing.wait(interval):
                return

    def _repeat(self, payload: bytes) -> None:
        # A client that stops reading without leaving must not hold up the end of a test.
        self.connection.settimeout(2)
        chunk = f"{len(payload):x}\r\n".encode() + payload + b"\r\n"
        while not self.server.ollama.closing.is_set():
            self.wfile.write(chunk)

    def _reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # The socket closes when nothing that was made from it is open any more.
        self.rfile.close()
        self.connection.close()
