"""Examples as a model takes them: tensors that know how they may be trimmed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from functools import partial

import torch
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.data import Example


@dataclass(frozen=True)
class Field:
    """One input of a model for a number of examples.

    Attributes:
        rows: A tensor with one row an example.
        pad_axis: The axis along which short rows are padded, so that a batch of short rows can be
            trimmed; None where nothing is padded (pixels, features).
    """

    rows: Tensor
    pad_axis: int | None = None

    def select(self, index: Tensor, longest: int) -> Field:
        """The rows of an index, trimmed to the longest of them."""
        rows = self.rows[index]
        if self.pad_axis is not None:
            rows = rows.narrow(self.pad_axis, 0, longest)
        return Field(rows, self.pad_axis)


@dataclass(eq=False)
class Late:
    """A tensor that is computed when it is first asked for, and then kept.

    Attributes:
        compute: Computes it.
    """

    compute: Callable[[], Tensor]
    _found: Tensor | None = field(default=None, init=False, repr=False)

    def __call__(self) -> Tensor:
        if self._found is None:
            # Whoever asks first: an inference tensor could not be trained on later.
            with torch.inference_mode(False), torch.no_grad():
                self._found = self.compute()
        return self._found


def _no_encodings() -> Tensor:
    raise ValueError("These examples come without encodings: encode them without a prompt.")


@dataclass(frozen=True, eq=False)
class Split:
    """Examples on a model's device.

    Attributes:
        examples: The examples themselves, so that another model can encode them, too.
        labels: Label indices, of shape ``(B,)``.
        fields: What the model reads, by name.
        lengths: Tokens of each example; equal where length costs nothing.
        encodings: Gives the unit features of the examples without a prompt, of shape ``(B, h)``.
            They are computed when they are first asked for, once for all selections of a split.
    """

    examples: tuple[Example, ...]
    labels: Tensor
    fields: Mapping[str, Field]
    lengths: tuple[int, ...]
    encodings: Callable[[], Tensor] = field(default=_no_encodings, repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, name: str) -> Tensor:
        """The tensor of one field."""
        return self.fields[name].rows

    def select(self, indices: Sequence[int]) -> Split:
        """The examples of these indices, padded no further than the longest of them."""
        index = torch.tensor(indices, device=self.labels.device)
        lengths = tuple(self.lengths[i] for i in indices)
        longest = max(lengths)
        return Split(
            tuple(self.examples[i] for i in indices),
            self.labels[index],
            {name: field.select(index, longest) for name, field in self.fields.items()},
            lengths,
            Late(partial(_rows, self.encodings, index)),
        )

    def batches(self, size: int) -> Iterator[list[int]]:
        """Indices of batches of like lengths; one batch in the given order if all fit into it."""
        n = len(self)
        order = range(n) if n <= size else sorted(range(n), key=self.lengths.__getitem__)
        for start in range(0, n, size):
            yield list(order[start : start + size])

    def in_parts(self, batches: Sequence[Sequence[int]], run: Callable[[Split], Tensor]) -> Tensor:
        """What ``run`` gives for batches of all examples, (P, b, ·), in the examples' order."""
        if len(batches) == 1:
            return run(self)
        parts = [run(self.select(batch)) for batch in batches]
        order = torch.tensor([i for batch in batches for i in batch], device=self.labels.device)
        return torch.cat(parts, dim=1)[:, order.argsort()]


def _rows(encodings: Callable[[], Tensor], index: Tensor) -> Tensor:
    return encodings()[index]
