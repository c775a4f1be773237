"""A Hugging Face chat model and the tokens it writes, without a trace in torch's random numbers.

A training loop in the same process draws the numbers that it would have drawn without it: tokens
are sampled with a generator of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import threading
import time
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ProviderError


if TYPE_CHECKING:
    import torch

#: Only the likeliest tokens are sampled, as a large vocabulary has many unlikely ones.
TOP_K = 40
TOP_P = 0.9


class Written(NamedTuple):
    """What a model wrote, without special tokens."""

    text: str
    n_tokens: int  # Special tokens included.
    is_ended: bool  # By the model itself.
    is_late: bool  # The deadline came first.


@dataclass(frozen=True)
class ChatModel:
    """A model on its device, and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a reply: some models name them in the one place, some in the other."""
        ids = self.model.generation_config.eos_token_id
        listed = ids if isinstance(ids, list) else [ids]
        return sorted({i for i in [*listed, self.tokenizer.eos_token_id] if i is not None})

    def encode(self, prompt: str) -> torch.Tensor:
        """The ids of a prompt as one user's message, of shape (1, tokens)."""
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=False,  # For the templates that know it.
            return_dict=True,
            return_tensors="pt",
        )
        ids: torch.Tensor = inputs["input_ids"]
        return ids

    def write(
        self,
        ids: torch.Tensor,
        *,
        seed: int,
        temperature: float,
        limit: int,
        deadline: float,
        given_up: threading.Event,
    ) -> Written:
        """Goes on after a prompt.

        Args:
            ids: The prompt.
            seed: The same seed is the same text, on the same device.
            temperature: 0 takes the likeliest token each time.
            limit: Most tokens to write.
            deadline: When to stop, by ``time.monotonic``.
            given_up: Set when nobody waits for the reply any more.
        """
        import torch
        from transformers import LogitsProcessorList
        from transformers import StoppingCriteriaList

        if time.monotonic() >= deadline:
            return Written("", 0, is_ended=False, is_late=True)
        stop = _Deadline(deadline, given_up)
        ids = ids.to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config(limit),
                logits_processor=LogitsProcessorList(
                    [_Sampling(seed, temperature)] if temperature else []
                ),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        new: list[int] = output[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        is_ended = bool(new) and new[-1] in self.end_ids
        return Written(text, len(new), is_ended, stop.is_late)

    def _config(self, limit: int) -> Any:
        from transformers import GenerationConfig

        padding = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.end_ids or None,
            pad_token_id=next(iter(self.end_ids), None) if padding is None else padding,
        )


def load_chat_model(name: str, *, device: str, dtype: str, **source: Any) -> ChatModel:
    """Loads a model, frozen.

    Args:
        name: A folder, or a name at the hub.
        device: A torch device, or ``"auto"``.
        dtype: Name of a torch dtype, or ``"auto"``.
        source: Where ``from_pretrained`` may look.

    Raises:
        ProviderError: If it cannot be loaded, or is not one to chat with.
    """
    import torch  # noqa: F401, without it transformers says nothing of use
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    try:
        with _without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(name, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source)
        model.to(_best_device() if device == "auto" else device)
    except Exception as error:  # Broken files raise many kinds of errors.
        raise ProviderError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    if not tokenizer.chat_template:
        raise ProviderError(f"model {name!r} has no chat template: take a chat (instruct) model")
    model.eval().requires_grad_(False)
    return ChatModel(model, tokenizer)


class _Sampling:
    """Draws a token and rules all others out: a processor of logits for ``generate``."""

    def __init__(self, seed: int, temperature: float) -> None:
        import torch
        from transformers import TemperatureLogitsWarper
        from transformers import TopKLogitsWarper
        from transformers import TopPLogitsWarper

        # On the CPU: the same seed is the same numbers on every device.
        self._generator = torch.Generator().manual_seed(seed)
        self._warpers = (
            TemperatureLogitsWarper(float(temperature)),
            TopKLogitsWarper(TOP_K),
            TopPLogitsWarper(TOP_P),
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        for warper in self._warpers:
            scores = warper(input_ids, scores)
        likely = scores.float().softmax(dim=-1).cpu()
        drawn = torch.multinomial(likely, 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn.to(scores.device), 0.0)


class _Deadline:
    """Ends a generation when the time is up or the process ends: a criterion for ``generate``."""

    def __init__(self, deadline: float, given_up: threading.Event) -> None:
        self._deadline = deadline
        self._given_up = given_up
        self.is_late = False

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        import torch

        self.is_late = time.monotonic() >= self._deadline or self._given_up.is_set()
        return torch.full((len(input_ids),), self.is_late, device=input_ids.device)


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()
