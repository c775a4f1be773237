"""A model that is somewhere else: it takes embeddings and texts, and gives log-probabilities.

Nothing else is known of it, so methods without gradients are all that can tune its prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
import hashlib
import json
from typing import Any
import urllib.error
import urllib.request

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray
import torch
from torch import Tensor

from optuna_llm_catalyst.exceptions import check_at_least
from optuna_llm_catalyst.exceptions import first_line
from optuna_llm_catalyst.exceptions import ModelError
from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models import meter
from optuna_llm_catalyst.prompt_tuning.models.base import SOFT
from optuna_llm_catalyst.prompt_tuning.prompts import Placement
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.split import Split


#: Soft prompts (P, L, d) in float32 and B examples to log-probabilities (P, B, C).
LogProbs = Callable[[NDArray[np.float32], Sequence[Example]], ArrayLike]
#: How far the probabilities of a text may be from a sum of 1.
_TOLERANCE = 1e-2


class BlackBoxModel:
    """A task model whose log-probabilities come from a function: of a server, another process, ….

    Args:
        log_probs: Takes virtual tokens ``(P, L, d)`` and ``B`` examples; gives the natural
            logarithms of the labels' probabilities, ``(P, B, C)``. It may be called from several
            threads. :func:`over_http` makes one.
        embeddings: The embeddings of the tokenizer's tokens, ``(V, d)``, by token id: where a
            restart prompt starts.
        labels: Label names.
        name: The model's name.
        max_virtual_tokens: The longest prompt that it takes.
        batch_size: Examples of one call at most, for one prompt or for many.
        mechanism: In a sentence for an LLM: where the prompt stands and how a label is read.

    Raises:
        ValueError: If an argument is out of range.
    """

    is_differentiable = False

    def __init__(
        self,
        log_probs: LogProbs,
        embeddings: ArrayLike,
        labels: Sequence[str],
        *,
        name: str,
        max_virtual_tokens: int = 64,
        batch_size: int = 64,
        mechanism: str = "The model reads `<prompt> <text>` and gives each label a probability.",
    ) -> None:
        check_at_least(1, max_virtual_tokens=max_virtual_tokens, batch_size=batch_size)
        table = np.ascontiguousarray(embeddings, dtype=np.float32)
        if table.ndim != 2 or not table.size or not np.isfinite(table).all():
            raise ValueError(
                "`embeddings` must hold a finite vector for each token, of shape (V, d), got "
                f"shape {table.shape}."
            )
        if not name:
            raise ValueError("`name` must not be empty: it tells the study's model from others.")
        self.name = name
        digest = hashlib.sha256(repr((name, table.shape)).encode() + table.tobytes())
        self.fingerprint = f"BlackBoxModel:{digest.hexdigest()[:16]}"
        self.labels = tuple(labels)
        self.mechanism = mechanism
        self.placement = Placement(("texts",), 1, max_virtual_tokens)
        self.settings: dict[str, float | str | None] = {}
        self.vocab_size = len(table)
        self.device = torch.device("cpu")
        self.batch_size = batch_size
        self._log_probs = log_probs
        self._table = torch.from_numpy(table)

    def embed(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        ids = torch.tensor([list(ids) for ids in token_ids])
        if ids.numel() and int(ids.max()) >= self.vocab_size:
            raise ValueError(
                f"`token_ids` holds {int(ids.max())}, but there are {self.vocab_size} embeddings "
                "only: do tokenizer and model belong together?"
            )
        return self._table[ids]  # (P, L, d)

    def encode(self, examples: Sequence[Example]) -> Split:
        labels = torch.tensor([example.label for example in examples])
        return Split(tuple(examples), labels, {}, (1,) * len(examples))

    def start(
        self, token_ids: Sequence[Sequence[int]], train: Split, kind: PromptKind = SOFT
    ) -> Prompt:
        return Prompt(kind, kind.start(self.embed(token_ids), self.placement))

    def log_probs(self, prompt: Prompt, batch: Split) -> Tensor:
        """See :class:`TaskModel`. No gradient flows.

        Raises:
            RuntimeError: If a gradient is asked for.
            ModelError: If the function fails, or gives no log-probabilities.
        """
        tensors = prompt.tensors.values()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f"{self.name} is a black box: it has no gradient to give.")
        rows = prompt.words().detach().float().cpu().numpy()  # (P, L, d)
        size = max(1, self.batch_size // len(rows))
        parts = [
            self._query(part, batch.examples[start : start + size])
            for part in np.split(rows, range(self.batch_size, len(rows), self.batch_size))
            for start in range(0, len(batch), size)
        ]
        n_parts = -(-len(batch) // size)
        groups = [parts[i : i + n_parts] for i in range(0, len(parts), n_parts)]
        return torch.cat([torch.cat(group, 1) for group in groups])

    def spreads(self, prompt: Prompt, batch: Split) -> dict[str, float]:
        return {name: self._table.double().std().item() for name in prompt.trained}

    def metered(self) -> AbstractContextManager[meter.Passes]:
        return meter.metered(self)

    def _query(self, rows: NDArray[np.float32], examples: Sequence[Example]) -> Tensor:
        """One call: (p, L, d) and b examples to (p, b, C)."""
        try:
            found = np.asarray(self._log_probs(rows, examples), dtype=np.float32)
        except ModelError:
            raise
        except Exception as error:  # The function is anybody's.
            raise ModelError(
                f"{self.name} gave no log-probabilities: {first_line(error)}"
            ) from error
        shape = (len(rows), len(examples), len(self.labels))
        if found.shape != shape:
            raise ModelError(
                f"{self.name} gave log-probabilities of shape {found.shape}, expected {shape}: "
                "prompts, examples, labels."
            )
        if not np.allclose(np.exp(found).sum(-1), 1, atol=_TOLERANCE):
            raise ModelError(f"{self.name} gave log-probabilities that do not sum to 1.")
        # A probability of 0 would make losses infinite, and what is learnt from them NaN.
        found = np.maximum(found, np.log(np.finfo(np.float32).tiny))
        meter.count(self, len(rows) * len(examples))
        return torch.tensor(found)  # A copy: the function may use its array again.


def over_http(url: str, *, timeout: float = 60.0) -> LogProbs:
    """A function for :class:`BlackBoxModel` that asks a server.

    It posts JSON, ``{"embeddings": …, "texts": […], "text_pairs": […]}`` with embeddings of
    nesting (P, L, d), and reads ``{"log_probs": …}`` of nesting (P, B, C).

    Args:
        url: Where to post.
        timeout: Seconds to wait for an answer.
    """

    def log_probs(rows: NDArray[np.float32], examples: Sequence[Example]) -> ArrayLike:
        body: dict[str, Any] = {
            "embeddings": rows.tolist(),
            "texts": [example.text for example in examples],
            "text_pairs": [example.text_pair for example in examples],
        }
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found: ArrayLike = json.load(answer)["log_probs"]
        except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{url} gave no log-probabilities: {first_line(error)}") from error
        return found

    return log_probs
