"""A server on this machine with the routes of OpenAI's API, for the real client to talk to."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
import threading
from types import TracebackType
from typing import Any

from tests.ollama_server import _Handler as _OllamaHandler
from tests.ollama_server import _Server
from tests.ollama_server import Fault
from tests.ollama_server import Replies
from tests.ollama_server import Reply
from tests.ollama_server import Request


DEFAULT_MODELS = ("qwen3-4b",)


@dataclass(frozen=True)
class Endless(Fault):
    """A body that never ends: the same bytes again and again.

    Attributes:
        pause: Seconds between two times.
    """

    pause: float = 0.0


@dataclass(frozen=True)
class Redirect(Fault):
    """The way to another place.

    Attributes:
        location: Where it leads.
    """

    location: str = ""


class OpenAIServer:
    """A server in this process, for the time of a ``with`` block.

    Args:
        replies: One for each chat request, in their order, or a function of the decoded request:
            a content, fields that differ from a good answer's, or a fault.
        models: Names of the models it has.
        faults: What a path answers instead, as in ``{"/v1/models": Fault(500)}``.

    Attributes:
        requests: Everything it was asked, in the order of arrival.
    """

    def __init__(
        self,
        replies: Replies = (),
        *,
        models: Sequence[str] = DEFAULT_MODELS,
        faults: Mapping[str, Fault] | None = None,
    ) -> None:
        self.replies = replies
        self.models = tuple(models)
        self.faults = dict(faults or {})
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.ollama = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests."""
        return [r.body for r in self.requests if r.path == "/v1/chat/completions"]

    def __enter__(self) -> OpenAIServer:
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

    def answer(self, request: Request) -> Fault | dict[str, Any]:
        """The answer to a request: a fault or a JSON body."""
        self.requests.append(request)
        if request.path in self.faults:
            return self.faults[request.path]
        if (request.method, request.path) == ("GET", "/v1/models"):
            return {"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]}
        if (request.method, request.path) == ("POST", "/v1/chat/completions"):
            return self._chat(request.body)
        return Fault(404, {"detail": "Not Found"})

    def _chat(self, body: dict[str, Any]) -> Fault | dict[str, Any]:
        if body["model"] not in self.models:
            message = f"The model `{body['model']}` does not exist."
            return Fault(404, {"error": {"message": message, "code": 404}})
        reply = self._next_reply(body)
        if isinstance(reply, Fault):
            return reply
        fields = {"choices": [choice(reply)]} if isinstance(reply, str) else dict(reply)
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1_787_306_400,
            "model": body["model"],
            "usage": {"prompt_tokens": 120, "completion_tokens": 30, "total_tokens": 150},
            **fields,
        }

    def _next_reply(self, body: dict[str, Any]) -> Reply:
        if callable(self.replies):
            return self.replies(body)
        i = len(self.chats) - 1
        if i < len(self.replies):
            return self.replies[i]
        return Fault(500, {"error": {"message": f"the test has no reply to chat request {i}"}})


def choice(content: Any, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    """One of the choices of an answer."""
    return {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish_reason,
    }


class _Handler(_OllamaHandler):
    def _send(self, answer: Fault) -> None:
        if isinstance(answer, Endless):
            self._send_without_end(answer)
        elif isinstance(answer, Redirect):
            self.send_response(answer.status)
            self.send_header("Location", answer.location)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
        else:
            super()._send(answer)

    def _send_without_end(self, answer: Endless) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Connection", "close")
        self.end_headers()
        # Until the client has enough of it: writing to it is an OSError then.
        while not self.server.ollama.closing.wait(answer.pause):
            self.wfile.write(answer.payload())
