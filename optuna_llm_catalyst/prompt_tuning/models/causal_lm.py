"""A causal language model that goes on behind a text with the labels' words.

The model reads ``prompt text It was``, and a word's score is its log-probability there, divided by
its number of tokens, so that long words are not behind for their length (GPT-3, arXiv 2005.14165,
appendix G). The prefix is read once: its keys and values serve the further tokens of all words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from optuna_llm_catalyst.prompt_tuning.data import Example
from optuna_llm_catalyst.prompt_tuning.models import templates
from optuna_llm_catalyst.prompt_tuning.models import tokens
from optuna_llm_catalyst.prompt_tuning.models.continuation import check_causal
from optuna_llm_catalyst.prompt_tuning.models.continuation import read_on
from optuna_llm_catalyst.prompt_tuning.models.continuation import window_of
from optuna_llm_catalyst.prompt_tuning.models.label_words import LabelWordsClassifier
from optuna_llm_catalyst.prompt_tuning.models.lm_head import WordHead
from optuna_llm_catalyst.prompt_tuning.models.templates import Verbalizers
from optuna_llm_catalyst.prompt_tuning.pretrained import Head
from optuna_llm_catalyst.prompt_tuning.pretrained import Pretrained
from optuna_llm_catalyst.prompt_tuning.prompts import Prompt
from optuna_llm_catalyst.prompt_tuning.prompts import Side
from optuna_llm_catalyst.prompt_tuning.split import Split


#: Sequences in one pass, be they prefixes or words behind them.
_MAX_SEQUENCES = 64
DEFAULT_TEMPLATE = "{text} It was"


class CausalLMClassifier(LabelWordsClassifier):
    """Classifies by the words with which a text would most likely go on.

    Args:
        pretrained: A causal language model, of ``load_pretrained(name, head="causal-lm")``. It is
            frozen in place.
        labels: Label names.
        template: What the model reads behind the prompt, with ``{text}`` and, for pairs,
            ``{text_pair}``, once each. Words follow behind a space, or directly where it ends in
            a line break.
        verbalizers: The words of each label, of one or several tokens; by default the label's
            name with underscores read as spaces. A text is read as JSON: so settings keep them.
        max_length: Tokens at which a text is cut, the template besides.
        max_virtual_tokens: Positions kept free for the prompt.

    Raises:
        ValueError: If the model has no head, does not read from left to right, or cannot read on
            from a cache where words have several tokens; if a template lacks a field, or a word
            has no tokens of its own behind it.
    """

    mechanism = (
        "A causal language model reads `<prompt> <text>` and the start of a sentence; a text gets "
        "the label with whose words the sentence would most likely go on."
    )
    head: Head = "causal-lm"
    _unread = frozenset({"token_type_ids"})

    def __init__(
        self,
        pretrained: Pretrained,
        labels: Sequence[str],
        *,
        template: str = DEFAULT_TEMPLATE,
        verbalizers: Verbalizers | str | None = None,
        max_length: int = 128,
        max_virtual_tokens: int = 64,
    ) -> None:
        super().__init__(
            pretrained,
            labels,
            # A space that a word stands behind belongs to its first token.
            template=templates.checked(template, "text").rstrip(" "),
            verbalizers=verbalizers,
            max_length=max_length,
            max_virtual_tokens=max_virtual_tokens,
        )
        reads_on = self._n_further > 0
        check_causal(self.encoder, reads_on=reads_on)
        # The normaliser over the vocabulary is the same for all words of one token.
        rows = None if reads_on else [ids[0] for ids in self._word_ids]
        self._words = WordHead(pretrained.language_model, rows)
        ids = [torch.tensor(ids, device=self.device) for ids in self._word_ids]
        self._ids = pad_sequence(ids, batch_first=True, padding_value=-1)  # (W, n)
        self._n_tokens = (self._ids >= 0).sum(1)  # (W,)
        self._n_trailing = tokens.n_trailing_special_tokens(self._tokenizer)

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Split:
        split = self._tokenize([self._filled(e) for e in examples], max_length=None)
        room = self._n_positions - self.placement.max_virtual_tokens - self._n_further
        for example, length in zip(examples, split.lengths, strict=True):
            if length > room:
                raise ValueError(
                    f"The text {example.text[:60]!r} is {length} tokens in its template, there is "
                    f"room for {room}: lower `max_length`, or `max_virtual_tokens`."
                )
        # Nothing may stand between a text and the word behind it.
        split = tokens.without_end(split, self._n_trailing)
        return self._with_encodings(replace(split, examples=tuple(examples)))

    def log_probs(self, prompt: Prompt, batch: Split) -> Tensor:
        self._check_length(prompt)
        scores = self._features(batch, prompt, "texts", max_sequences=_MAX_SEQUENCES)
        return F.log_softmax(scores, dim=-1)  # (P, B, C)

    def _pass(self, batch: Split, prompt: Prompt | None, side: Side) -> Tensor:
        """The labels' scores behind a batch under some prompts: (P, b, C).

        Without a prompt these are the hidden states at the texts' ends: (1, b, d).
        """
        reads_on = prompt is not None and self._n_further > 0
        if prompt is not None and reads_on and self._hides_texts(batch, prompt):
            return self._by_length(batch, prompt, side)
        output, mask = self._forward(batch, prompt, side, use_cache=reads_on)
        rows = torch.arange(len(mask), device=mask.device)
        hidden: Tensor = output.last_hidden_state[rows, mask.sum(1) - 1]  # (P*b, d)
        if prompt is None:
            return hidden.unsqueeze(0)
        logits = self._words(hidden).float()  # (P*b, W), or (P*b, V) where words are longer
        if self._n_further:
            first = logits[:, self._ids[:, 0]] - logits.logsumexp(1, keepdim=True)
            logits = self._with_further(first, mask, output.past_key_values) / self._n_tokens
        scores: Tensor = logits @ self._means  # (P*b, C)
        return scores.view(-1, len(batch), len(self.labels))

    def _hides_texts(self, batch: Split, prompt: Prompt) -> bool:
        """Whether padding between a text and a word pushes the text out of a layer's window."""
        window = window_of(self.encoder)
        longest = prompt.words().shape[1] + max(batch.lengths) + self._n_further
        return window is not None and longest > window and len(set(batch.lengths)) > 1

    def _by_length(self, batch: Split, prompt: Prompt, side: Side) -> Tensor:
        """The same scores, from passes over texts of one length, which have no padding."""
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(batch.lengths):
            groups.setdefault(length, []).append(i)
        rows = list(groups.values())
        return batch.in_parts(rows, lambda part: self._pass(part, prompt, side))

    def _with_further(self, first: Tensor, mask: Tensor, cache: object) -> Tensor:
        """Log-probabilities of whole words, (N, W), of those of their first tokens."""
        long = (self._n_tokens > 1).nonzero().squeeze(1)
        for words in long.split(max(1, _MAX_SEQUENCES // len(mask))):
            further = self._further(self._ids[words], mask, cache)  # (N, K)
            first = first.index_add(1, words, further)
        return first

    def _further(self, ids: Tensor, mask: Tensor, cache: object) -> Tensor:
        """Log-probabilities of words' tokens behind their first, (N, K), of words (K, n)."""
        hidden = read_on(self.encoder, ids[:, :-1].clamp(min=0), mask, cache)  # (N*K, n-1, d)
        following = ids[:, 1:].repeat(len(mask), 1)  # (N*K, n-1)
        is_token = following >= 0
        logits = self._words(hidden[is_token]).float()  # (tokens, V)
        chosen = logits.gather(1, following[is_token].unsqueeze(1)).squeeze(1)
        each = torch.zeros_like(following, dtype=logits.dtype)
        each = each.masked_scatter(is_token, chosen - logits.logsumexp(1))
        return each.sum(1).view(len(mask), len(ids))

    def _ids_of(self, word: str) -> list[int]:
        """The tokens of a word behind the template."""
        before = self.template.format(text="a", text_pair="a")
        joint = "" if before[-1].isspace() else " "
        prefix, whole = (
            list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (before, f"{before}{joint}{word}")
        )
        own = whole[len(prefix) :]
        if not own or whole[: len(prefix)] != prefix or self._tokenizer.unk_token_id in own:
            raise ValueError(
                f"The word {word!r} behind the template {self.template!r} is the tokens "
                f"{self._tokenizer.convert_ids_to_tokens(own)}: name another in `verbalizers`, or "
                "end `template` otherwise."
            )
        return own
