"""A frozen sentence encoder that reads sequences with virtual tokens among them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from functools import partial
import math
from typing import Any

import torch
from torch import Tensor
import torch.nn.functional as F

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models import meter
from optuna_llm_catalyst.prompt_tuning.models import tokens
from optuna_llm_catalyst.prompt_tuning.models.base import SOFT
from optuna_llm_catalyst.prompt_tuning.models.layers import added
from optuna_llm_catalyst.prompt_tuning.models.layers import find_layers
from optuna_llm_catalyst.prompt_tuning.models.layers import spread
from optuna_llm_catalyst.prompt_tuning.models.layers import watched
from optuna_llm_catalyst.prompt_tuning.pretrained import Head
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import place_of
from optuna_llm_catalyst.prompt_tuning.prompts import Placement
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import PromptKind
from optuna_llm_catalyst.prompt_tuning.prompts import Side
from optuna_llm_catalyst.prompt_tuning.split import Late
from optuna_llm_catalyst.prompt_tuning.split import Split


#: Token ids whose embeddings are looked up at once, sequences whose states are looked at, and
#: those that are read at once without a prompt.
_MAX_IDS = 8192
_MAX_WATCHED = 64
_MAX_ENCODED = 128


class PromptedEncoder:
    """What task models on an encoder share. It is frozen in place and put into eval mode.

    Args:
        pretrained: The encoder, its tokenizer and its pooling.

    Raises:
        ValueError: If the encoder reads embeddings otherwise than the tokens they belong to.
    """

    is_differentiable = True
    placement: Placement
    #: Whether the text of an example is the path of an image.
    reads_images = False
    #: What of the pretrained model is needed besides its encoder.
    head: Head = "none"
    #: Whether a sequence is read by its pooled states, or by one of them.
    _pools = True
    #: Fields of a split that the encoder does not read.
    _unread: frozenset[str] = frozenset()

    def __init__(self, pretrained: Pretrained) -> None:
        if pretrained.image_tower is not None and not self.reads_images:
            raise ValueError(
                f"{pretrained.name} comes with an image tower, which {type(self).__name__} does "
                "not read: take CLIPClassifier."
            )
        self.name = pretrained.name
        self.revision = pretrained.revision
        # Task models on one encoder take prompts in different places.
        self.fingerprint = f"{type(self).__name__}:{pretrained.fingerprint}"
        self.encoder = pretrained.encoder.eval().requires_grad_(False)
        self._tokenizer = pretrained.tokenizer
        self._pooling = pretrained.pooling
        tokens.check_embeds(self.encoder, self._tokenizer)
        meter.install(self.encoder)
        self._n_positions = tokens.max_positions(self._tokenizer, self.encoder)
        some_ids = torch.arange(2, device=self.device).unsqueeze(0)
        self._layers, self._layer_width = find_layers(
            self.encoder, tokens.embed_tokens(self.encoder, some_ids)
        )
        self._offset = tokens.n_leading_special_tokens(self._tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    @property
    def vocab_size(self) -> int:
        return int(self.encoder.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    def metered(self) -> AbstractContextManager[meter.Passes]:
        """Counts this thread's passes within a ``with`` block."""
        return meter.metered(self.encoder)

    @torch.no_grad()
    def embed(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """The embeddings of hard prompts in float32, of shape ``(P, L, d)``.

        Raises:
            ValueError: If the model does not embed one of the tokens.
        """
        highest = max((max(ids, default=0) for ids in token_ids), default=0)
        if highest >= self.vocab_size:
            raise ValueError(
                f"`token_ids` holds {highest}, but the model embeds {self.vocab_size} tokens "
                "only: do tokenizer and model belong together?"
            )
        ids = torch.tensor([list(ids) for ids in token_ids], device=self.device)
        return tokens.embed_tokens(self.encoder, ids).float()

    def start(
        self, token_ids: Sequence[Sequence[int]], train: Split, kind: PromptKind = SOFT
    ) -> Prompt:
        """``P`` prompts that start at words, without a head."""
        return Prompt(kind, kind.start(self.embed(token_ids), self.placement))

    def _tokenize(
        self, examples: Sequence[Example], *, max_length: int | None, n_reserved: int = 0
    ) -> Split:
        """Tokenises examples; ``n_reserved`` positions are kept free for a prompt."""
        found = tokens.encode_texts(
            self._tokenizer, examples, self.encoder, max_length=max_length, n_reserved=n_reserved
        )
        return self._with_encodings(found)

    def _with_encodings(self, split: Split) -> Split:
        """Token sequences that are read without a prompt when that is first asked for."""
        return replace(split, encodings=Late(partial(self._encodings, split)))

    def _encodings(self, split: Split) -> Tensor:
        """Unit features of sequences without a prompt, of shape ``(B, h)``."""
        pooled = self._features(split, None, "texts", max_sequences=_MAX_ENCODED)
        whole = torch.promote_types(pooled.dtype, torch.float32)  # What is in half precision.
        return F.normalize(pooled[0].to(whole), dim=-1)

    def _features(
        self, split: Split, prompt: Prompt | None, side: Side, *, max_sequences: int
    ) -> Tensor:
        """Pooled features of every sequence under every prompt, in float32.

        Args:
            split: Token sequences.
            prompt: ``P`` prompts, or None for the sequences as they are.
            side: Which side of the prompts belongs to these sequences.
            max_sequences: Most sequences in one pass.

        Returns:
            Features of shape ``(P, B, d)``.
        """
        n_prompts = 1 if prompt is None else len(prompt)
        batches = list(split.batches(max(1, max_sequences // n_prompts)))
        groups = list(_groups(prompt, max_sequences))
        return split.in_parts(
            batches, lambda batch: torch.cat([self._pass(batch, some, side) for some in groups])
        )

    def _pass(self, batch: Split, prompt: Prompt | None, side: Side) -> Tensor:
        """One forward pass over a batch under some prompts, pooled: (P, b, d)."""
        output, mask = self._forward(batch, prompt, side)
        pooled = self._pool(output.last_hidden_state, mask, batch)
        pooled = pooled.view(-1, len(batch), pooled.shape[-1])  # (P or 1, b, d)
        return pooled if prompt is None else pooled.expand(len(prompt), -1, -1)

    def _forward(
        self, batch: Split, prompt: Prompt | None, side: Side, **options: bool
    ) -> tuple[Any, Tensor]:
        """What the encoder makes of a batch under some prompts, and the attention mask of that.

        There is one sequence for each prompt and text, (P*b, L+T), or for each text, (b, T), if
        nothing stands before them.
        """
        inputs = {n: field.rows for n, field in batch.fields.items() if n not in self._unread}
        layers = {} if prompt is None else prompt.layers(side, batch)
        if not layers:
            return self.encoder(**inputs, **options), inputs["attention_mask"]
        embedded = tokens.embed_tokens(self.encoder, inputs["input_ids"])  # (b, T, d)
        embeddings, inputs = tokens.splice_prompts(
            layers[0], inputs, embedded, offset=self._offset
        )
        deeper = {
            layer: rows.expand(-1, len(batch), -1, -1).flatten(0, 1)  # (P*b, L, d)
            for layer, rows in layers.items()
            if layer > 0
        }
        n_layers = self.placement.n_layers
        if max(layers) >= n_layers:
            raise ValueError(
                f"The prompt stands at the layers {sorted(layers)}; this model takes prompts at "
                f"{n_layers} layers only, the first of them its input."
            )
        with added(self._layers, deeper, offset=self._offset):
            output = self.encoder(inputs_embeds=embeddings, **inputs, **options)
        return output, inputs["attention_mask"]

    def _placed(
        self,
        sides: tuple[Side, ...],
        max_virtual_tokens: int,
        room: Mapping[Side, int] | None = None,
    ) -> Placement:
        """Where the encoder takes virtual tokens; see :class:`Placement`."""
        n_layers = max(len(self._layers), 1)
        return Placement(
            sides,
            n_layers,
            max_virtual_tokens,
            room or {},
            layer_width=self._layer_width,
            encoding_width=self._encoding_width(),
        )

    @torch.no_grad()
    def _encoding_width(self) -> int:
        """The width of encodings, seen at a sequence of two tokens."""
        ids = torch.arange(2, device=self.device).unsqueeze(0)
        mask = torch.ones_like(ids)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return int((self._pooling(hidden, mask) if self._pools else hidden).shape[-1])

    def _check_length(self, prompt: Prompt) -> None:
        """Raises if a prompt before texts is longer than the room that was kept for it."""
        length = prompt.words().shape[1]
        if length > self.placement.max_virtual_tokens:
            raise ValueError(
                f"The prompt has {length} virtual tokens, the model keeps room for "
                f"{self.placement.max_virtual_tokens}: raise `max_virtual_tokens`."
            )

    def _pool(self, hidden: Tensor, attention_mask: Tensor, batch: Split) -> Tensor:
        """One vector for each sequence, (P*b, d), of hidden states (P*b, T, d)."""
        del batch
        return self._pooling(hidden, attention_mask)

    @torch.no_grad()
    def spreads(self, prompt: Prompt, batch: Split) -> dict[str, float]:
        """How much that varies what the tensors of a prompt stand among, by their names.

        At the input these are the embeddings of all tokens, at a further layer the hidden states
        of the sequences of that side, clipped (BBTv2, arXiv 2205.11200).

        Args:
            prompt: One prompt.
            batch: Texts.
        """
        if prompt.kind.needs_gradient:
            raise ValueError(
                f"A {prompt.kind.name} prompt has weights that stand among nothing, so a search "
                "without gradients has no size for its steps: take GradientStage."
            )
        places = {name: place_of(name) for name in prompt.trained}
        hidden: dict[Side, dict[int, float]] = {}
        for side in dict(side for side in places.values() if side[1] > 0):
            some = self._sequences(side, batch)
            with watched(self._layers) as seen:
                _, mask = self._forward(some, prompt, side)
            is_read = mask.bool()  # Some encoders pad further, behind everything.
            width = mask.shape[1]
            hidden[side] = {i: spread(states[:, :width][is_read]) for i, states in seen.items()}
        return {
            name: self._embedding_spread if layer == 0 else hidden[side][layer]
            for name, (side, layer) in places.items()
        }

    @cached_property
    def _embedding_spread(self) -> float:
        """The standard deviation of all tokens' embeddings."""
        ids = torch.arange(self.vocab_size, device=self.device)
        rows = (
            tokens.embed_tokens(self.encoder, some).cpu().double() for some in ids.split(_MAX_IDS)
        )
        sums = [(r.numel(), r.sum().item(), r.square().sum().item()) for r in rows]
        n, total, squares = (sum(column) for column in zip(*sums, strict=True))
        return math.sqrt(max(squares / n - (total / n) ** 2, 0.0))

    def _sequences(self, side: Side, batch: Split) -> Split:
        """Some of the sequences of a side."""
        del side
        return batch.select(range(min(len(batch), _MAX_WATCHED)))


def _groups(prompt: Prompt | None, size: int) -> Iterator[Prompt | None]:
    """The prompts in groups of a size; all at once, and not as copies, if they fit."""
    if prompt is None or len(prompt) <= size:
        yield prompt
        return
    for start in range(0, len(prompt), size):
        yield prompt[start : start + size]
