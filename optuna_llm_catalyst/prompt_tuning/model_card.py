"""The README.md of an exported classifier: what it is and how to use it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import json

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierState
from optuna_llm_catalyst.prompt_tuning.ensemble import Group


CARD_NAME = "README.md"
MATRIX_NAME = "class_matrix.npy"
_EXAMPLES = {True: '("a text", "its pair")', False: '"a text", "another text"'}


def model_card(state: ClassifierState, *, max_tokens: int | None = None) -> str:
    """A classifier's model card in Markdown.

    Args:
        state: The classifier.
        max_tokens: Where texts are cut, if its class matrix is exported, too.
    """
    parts = [
        f"---\nbase_model: {json.dumps(state.ensemble.model_name)}\n"
        "library_name: optuna-llm-catalyst\npipeline_tag: text-classification\n---",
        "# A text classifier of tuned prompts",
        "\n".join(_facts(state)),
        _usage(bool(state.facts.reads_pairs)),
    ]
    if max_tokens is not None:
        parts.append(_with_a_matrix(state, max_tokens))
    if state.facts.table:
        # A record may hold anything: a page must not read HTML in it.
        parts.append("## Measured\n\n" + state.facts.table.strip().replace("<", "&lt;"))
    return "\n\n".join(parts) + "\n"


def _facts(state: ClassifierState) -> Iterator[str]:
    found, facts = state.ensemble, state.facts
    n_stages = len(found.numbers)
    fit = " and a linear fit pulled towards it" if facts.is_fitted else ""
    yield f"- Labels: {', '.join(map(_code, found.labels))}"
    yield (
        f"- Frozen model: {_code(found.model_name)}"
        f"{f' at the revision {_code(facts.revision)}' if facts.revision else ''}, with the "
        f"fingerprint {_code(found.fingerprint)}. It is not in this folder."
    )
    yield (
        f"- Made by: {n_stages} stages of prompt tuning with {_code(facts.task_model)} "
        f"({_listed(facts.settings)}); their uniform ensemble{fit}"
    )
    yield from (f"  - {_group(group)}" for group in found.groups)
    yield f"- Made with: {_listed(facts.versions)}"


def _group(group: Group) -> str:
    numbers = ", ".join(str(member.number) for member in group.members)
    reading = "plain texts" if group.text_prompt is None else "texts behind a tuned prompt"
    return f"{reading}: weight {group.weight:.3g}, stages {numbers}"


def _usage(reads_pairs: bool) -> str:
    row = '{"text": "a text", "text_pair": "its pair"}' if reads_pairs else '{"text": "a text"}'
    return f"""## How to use it

With `optuna-llm-catalyst[tuning]` installed; the texts stay on the machine:

```python
from optuna_llm_catalyst.prompt_tuning import load_classifier

classifier = load_classifier("path/to/this/folder")
print(classifier.predict([{_EXAMPLES[reads_pairs]}]))
print(classifier.predict_proba([{_EXAMPLES[reads_pairs]}]))
```

```console
echo '{row}' | optuna-llm-catalyst predict path/to/this/folder
```"""


def _with_a_matrix(state: ClassifierState, max_tokens: int) -> str:
    found, revision = state.ensemble, state.facts.revision
    at = f", revision={revision!r}" if revision else ""
    return f"""## Without this package

`{MATRIX_NAME}` holds a row for each label: a vector and, as its last number, a bias. A text's
logits are its features' products with the vectors, plus the biases. With sentence-transformers
and NumPy alone:

```python
import numpy as np
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer({found.model_name!r}{at})
encoder.max_seq_length = {max_tokens}
features = encoder.encode([{_EXAMPLES[False]}], normalize_embeddings=True)
rows = np.load({MATRIX_NAME!r})
logits = features @ rows[:, :-1].T + rows[:, -1]
print(np.array({list(found.labels)!r})[logits.argmax(1)])
```"""


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{_code(name)} {_code(str(value))}" for name, value in values.items())


def _code(text: str) -> str:
    """A text as code, whatever it holds."""
    return f"`{one_line(text).replace('`', chr(39))}`"
