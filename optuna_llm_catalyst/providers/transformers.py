"""A local LLM in this process, through Hugging Face transformers: no server, no daemon."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
import threading
import time
from typing import Any

from optuna_llm_catalyst.background import waitable
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import check_limits
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.chat_model import ChatModel
from optuna_llm_catalyst.providers.chat_model import load_chat_model
from optuna_llm_catalyst.providers.chat_model import TOP_K
from optuna_llm_catalyst.providers.chat_model import TOP_P


#: One loads or writes at a time, of whichever provider: two of Optuna's threads must not load the
#: weights twice. A lock on the provider could not be pickled.
_TURN = threading.Lock()
_PROCESS_ENDS = threading.Event()
_LAST_WAIT_S = 30.0


@atexit.register
def _stop_writing() -> None:
    """Ends a reply that nobody waits for: a thread killed within torch aborts the process."""
    _PROCESS_ENDS.set()
    _TURN.acquire(timeout=_LAST_WAIT_S)


class TransformersProvider:
    """Completions of a Hugging Face chat model that runs in this process.

    The weights are loaded at the first request and dropped from copies and pickles. torch's
    random numbers are left as they are. The JSON schema of a request is not enforced: whether a
    reply follows it is up to the model, and found out by the parser of replies. A request's
    ``timeout`` ends the writing between two tokens; loading the weights and reading the prompt
    are not interrupted, but the time for them counts.

    Args:
        model: A folder, or a name at the Hugging Face hub. It must be a chat (instruct) model.
        device: A torch device; ``"auto"`` takes the GPU if there is one.
        dtype: Name of a torch dtype; ``"auto"`` takes the one that the weights are stored in.
        num_ctx: Most tokens of prompt and reply together; fewer if the model was made for fewer.
        num_predict: Most tokens of a reply.
        temperature: Sampling temperature; 0 takes the likeliest token each time.
        local_files_only: Whether to look for the model on this machine only.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_ctx: int = 8192,
        num_predict: int = 512,
        temperature: float = 0.8,
        local_files_only: bool = False,
    ) -> None:
        if not model:
            raise ValueError(
                "`model` must be a folder or a name at the Hugging Face hub, got an empty string."
            )
        check_limits(num_ctx, num_predict, temperature)
        self.model = model
        self._device = device
        self._dtype = dtype
        self._num_ctx = num_ctx
        self._num_predict = num_predict
        self._temperature = temperature
        # Unset, transformers prompts in the terminal whether to run a model's own code.
        self._source = {"local_files_only": local_files_only, "trust_remote_code": False}
        self._context: int | None = None
        self._loaded: ChatModel | None = None

    @property
    def name(self) -> str:
        return f"transformers:{self.model}"

    @property
    def max_prompt_tokens(self) -> int:
        if self._context is None:
            try:
                self._context = self._context_by_config()
            except Exception:  # Loading the model will say what is wrong.
                self._context = self._num_ctx
        return max(self._context - self._num_predict, 0)

    def complete(self, request: CompletionRequest) -> Completion:
        deadline = time.monotonic() + request.timeout
        with self._mapped_errors(), self._turn(request.timeout):
            return self._complete(request, deadline)

    def check(self) -> None:
        """Checks that there is such a model, without loading it.

        Raises:
            ProviderError: If not.
        """
        with self._mapped_errors():
            try:
                self._context_by_config()
            except (OSError, ValueError) as error:
                raise ProviderError(
                    f"model {self.model!r} cannot be loaded: {first_line(error)}"
                ) from error

    def __getstate__(self) -> dict[str, Any]:
        # Weights are gigabytes: a copy loads its own at its first request.
        return {**self.__dict__, "_loaded": None}

    def _complete(self, request: CompletionRequest, deadline: float) -> Completion:
        started = time.monotonic()
        chat = self._chat_model()
        load_seconds = round(time.monotonic() - started, 3)
        ids = chat.encode(request.prompt)
        self._check_length(ids.shape[1])
        limit = min(self._num_predict, request.max_tokens or self._num_predict)
        written = chat.write(
            ids,
            seed=request.seed,
            temperature=self._temperature,
            limit=limit,
            deadline=deadline,
            given_up=_PROCESS_ENDS,
        )
        if written.is_late and not written.is_ended:
            raise ProviderError(
                f"{self.name} did not finish within {request.timeout:.3g} seconds: it took "
                f"{load_seconds:.3g} to load and wrote {written.n_tokens} tokens"
            )
        is_cut = written.n_tokens >= limit and not written.is_ended
        problem = f"it was cut at num_predict={limit} tokens" if is_cut else ""
        details = {
            "options": self._options(request.seed, limit),
            "device": str(chat.model.device),
            "dtype": str(chat.model.dtype).removeprefix("torch."),
            "prompt_tokens": ids.shape[1],
            "reply_tokens": written.n_tokens,
            "load_seconds": load_seconds,
        }
        return Completion(written.text, self.model, problem, details)

    def _chat_model(self) -> ChatModel:
        if self._loaded is None:
            self._loaded = load_chat_model(
                self.model, device=self._device, dtype=self._dtype, **self._source
            )
            self._context = self._context_of(self._loaded.model.config)
        return self._loaded

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens > self.max_prompt_tokens:
            raise ProviderError(
                f"the prompt has {n_tokens} tokens, and {self.name} has room for "
                f"{self.max_prompt_tokens} beside a reply of num_predict={self._num_predict}: "
                "raise `num_ctx`, lower `num_predict`, or take a model of a longer context"
            )

    def _options(self, seed: int, limit: int) -> dict[str, Any]:
        sampling = {"top_k": TOP_K, "top_p": TOP_P, "seed": seed} if self._temperature else {}
        return {
            "num_ctx": self._num_ctx,
            "num_predict": limit,
            "temperature": self._temperature,
            **sampling,
        }

    def _context_by_config(self) -> int:
        from transformers import AutoConfig

        return self._context_of(AutoConfig.from_pretrained(self.model, **self._source))

    def _context_of(self, config: Any) -> int:
        n_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        return min(self._num_ctx, n_positions or self._num_ctx)

    @contextmanager
    def _turn(self, timeout: float) -> Iterator[None]:
        if not _TURN.acquire(timeout=waitable(timeout)):
            raise ProviderError(
                f"{self.name} did not finish within {timeout:.3g} seconds: other requests of this "
                "process took longer"
            )
        try:
            yield
        finally:
            _TURN.release()

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except ProviderError:
            raise
        except ImportError as error:
            raise ProviderError(
                f"transformers cannot be used ({first_line(error)}): "
                "pip install 'optuna-llm-catalyst[tuning]'"
            ) from error
        except Exception as error:  # Models and chat templates are other people's code.
            message = f"{self.name} gave no answer: {type(error).__name__}: {first_line(error)}"
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                # The frames of the error hold what filled the memory.
                error = error.with_traceback(None)
                message += "; take a smaller model, a lower `num_ctx` or another `device`"
            raise ProviderError(message) from error
