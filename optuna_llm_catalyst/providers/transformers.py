"""A local LLM in this process, through Hugging Face transformers: no server, no daemon.

A training loop in the same process draws the random numbers that it would have drawn without it:
tokens are sampled with a generator of their own.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import threading
import time
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_llm_catalyst.background import waitable
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import LimitedProvider


if TYPE_CHECKING:
    import torch

#: Only the likeliest tokens are sampled, as a large vocabulary has many unlikely ones.
_TOP_K = 40
_TOP_P = 0.9
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


class _ChatModel(NamedTuple):
    model: Any
    tokenizer: Any


class TransformersProvider(LimitedProvider):
    """Completions of a Hugging Face chat model in this process.

    The weights are loaded at the first request and dropped from copies and pickles. Whether a
    reply follows the request's JSON schema is up to the model. A request's ``timeout`` ends the
    writing between two tokens; loading the weights and reading the prompt are not interrupted, but
    the time for them counts.

    Args:
        model: A chat (instruct) model: a folder, or a name at the Hugging Face hub.
        device: A torch device; ``"auto"`` takes the GPU if there is one.
        dtype: Name of a torch dtype; ``"auto"`` takes the one that the weights are stored in.
        num_ctx: Most tokens of prompt and reply together; fewer if the model was made for fewer.
        num_predict: Most tokens of a reply.
        temperature: Sampling temperature; 0 takes the likeliest token each time.
        local_files_only: Whether to look for the model on this machine only.
    """

    _kind = "transformers"

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
        super().__init__(model, num_ctx, num_predict, temperature)
        self._device = device
        self._dtype = dtype
        # Unset, transformers prompts in the terminal whether to run a model's own code.
        self._source = {"local_files_only": local_files_only, "trust_remote_code": False}
        self._context: int | None = None
        self._loaded: _ChatModel | None = None

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
        with self._mapped_errors():
            if not _TURN.acquire(timeout=waitable(request.timeout)):
                raise self._late(request, "other requests of this process took longer")
            try:
                return self._complete(request, deadline)
            finally:
                _TURN.release()

    def check(self) -> None:
        """Raises a ProviderError if there is no such model; does not load it."""
        with self._mapped_errors(), self._mapped_load_errors():
            self._context_by_config()

    def __getstate__(self) -> dict[str, Any]:
        # Weights are gigabytes: a copy loads its own at its first request.
        return {**self.__dict__, "_loaded": None}

    def _complete(self, request: CompletionRequest, deadline: float) -> Completion:
        started = time.monotonic()
        if self._loaded is None:
            self._loaded = self._load()
            self._context = None  # It may have been unknown.
        chat = self._loaded
        load_seconds = round(time.monotonic() - started, 3)
        prompt = _encode(chat, request.prompt)
        self._check_length(prompt.shape[1])
        limit = self._limit(request)
        seed, temperature = request.seed, self._temperature
        options = {"num_ctx": self._num_ctx, "num_predict": limit, "temperature": temperature}
        if temperature:
            options |= {"top_k": _TOP_K, "top_p": _TOP_P, "seed": seed}
        processors = [_sampling(seed, temperature)] if temperature else []
        reply = _write(chat, prompt, limit, processors, deadline)
        is_ended = bool(reply) and reply[-1] in _end_ids(chat)
        if _is_late(deadline) and not is_ended:
            done = f"it took {load_seconds:.3g} to load and wrote {len(reply)} tokens"
            raise self._late(request, done)
        is_cut = len(reply) >= limit and not is_ended
        details = {
            "options": options,
            "device": str(chat.model.device),
            "dtype": str(chat.model.dtype).removeprefix("torch."),
            "prompt_tokens": prompt.shape[1],
            "reply_tokens": len(reply),
            "load_seconds": load_seconds,
        }
        text = chat.tokenizer.decode(reply, skip_special_tokens=True)
        return self._completion(text, "", "length" if is_cut else "stop", limit, details)

    def _load(self) -> _ChatModel:
        import torch
        import transformers

        gpus = {"cuda": torch.cuda, "mps": torch.backends.mps}
        best = next((name for name, gpu in gpus.items() if gpu.is_available()), "cpu")
        with self._mapped_load_errors():
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, **self._source)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.model, dtype=self._dtype, **self._source
            )
            model.to(best if self._device == "auto" else self._device)
        if not tokenizer.chat_template:
            message = f"model {self.model!r} has no chat template: take a chat (instruct) model"
            raise ProviderError(message)
        model.eval().requires_grad_(False)
        return _ChatModel(model, tokenizer)

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens > self.max_prompt_tokens:
            raise ProviderError(
                f"the prompt has {n_tokens} tokens, and {self.name} has room for "
                f"{self.max_prompt_tokens} beside a reply of num_predict={self._num_predict}: "
                "raise `num_ctx`, lower `num_predict`, or take a model of a longer context"
            )

    def _context_by_config(self) -> int:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.model, **self._source).get_text_config()
        n_positions = getattr(config, "max_position_embeddings", None)
        return min(self._num_ctx, n_positions or self._num_ctx)

    def _late(self, request: CompletionRequest, why: str) -> ProviderError:
        late = f"did not finish within {request.timeout:.3g} seconds"
        return ProviderError(f"{self.name} {late}: {why}")

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

    @contextmanager
    def _mapped_load_errors(self) -> Iterator[None]:
        """Also without progress bars."""
        from transformers.utils import logging

        shows_progress = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        except Exception as error:  # Broken files raise many kinds of errors.
            message = f"model {self.model!r} cannot be loaded: {first_line(error)}"
            raise ProviderError(message) from error
        finally:
            if shows_progress:
                logging.enable_progress_bar()


def _is_late(deadline: float) -> bool:
    return time.monotonic() >= deadline or _PROCESS_ENDS.is_set()


def _end_ids(chat: _ChatModel) -> list[int]:
    """Ids that end a reply: some models name them in the one place, some in the other."""
    ids = chat.model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*listed, chat.tokenizer.eos_token_id] if i is not None})


def _encode(chat: _ChatModel, prompt: str) -> torch.Tensor:
    inputs = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        enable_thinking=False,  # For the templates that know it.
        return_dict=True,
        return_tensors="pt",
    )
    ids: torch.Tensor = inputs["input_ids"].to(chat.model.device)  # (1, tokens)
    return ids


def _write(
    chat: _ChatModel, prompt: torch.Tensor, limit: int, processors: list[Any], deadline: float
) -> list[int]:
    """The ids of a reply, special tokens among them; what there is of it when the time is up."""
    import torch
    import transformers

    if _is_late(deadline):
        return []
    end_ids = _end_ids(chat)
    output = chat.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            eos_token_id=end_ids or None,
            pad_token_id=next(iter(end_ids), None),  # One reply needs none, but it warns.
        ),
        logits_processor=transformers.LogitsProcessorList(processors),
        stopping_criteria=transformers.StoppingCriteriaList(
            [lambda ids, *_, **__: torch.full((1,), _is_late(deadline), device=ids.device)]
        ),
    )
    reply: list[int] = output[0, prompt.shape[1] :].tolist()
    return reply


def _sampling(seed: int, temperature: float) -> Callable[..., torch.Tensor]:
    """A processor of logits that draws a token and rules all others out."""
    import torch
    import transformers

    # On the CPU: the same seed is the same numbers on every device.
    generator = torch.Generator().manual_seed(seed)
    warpers = (
        transformers.TemperatureLogitsWarper(float(temperature)),
        transformers.TopKLogitsWarper(_TOP_K),
        transformers.TopPLogitsWarper(_TOP_P),
    )

    def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            scores = warper(ids, scores)
        likely = scores.float().softmax(dim=-1).cpu()
        drawn = torch.multinomial(likely, 1, generator=generator)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn.to(scores.device), 0.0)

    return draw
