"""The README.md of an exported classifier: what it is and how to use it."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
import json

from optuna_llm_catalyst.exceptions import one_line
from optuna_llm_catalyst.prompt_tuning.classifier_files import ClassifierState
from optuna_llm_catalyst.prompt_tuning.ensemble import Group


CARD_NAME = "README.md"
MATRIX_NAME = "class_matrix.npy"


@dataclass(frozen=True)
class _Inputs:
    """What a classifier reads.

    Attributes:
        one: One of them, with its article.
        in_python: Two of them in a list.
        as_json: A row of ``predict``.
        extras: The extras of this package that read them.
    """

    one: str
    in_python: str
    as_json: str
    extras: str = "tuning"

    @property
    def name(self) -> str:
        """One of them."""
        return self.one.split()[-1]


_TEXTS = _Inputs("a text", '"a text", "another text"', '{"text": "a text"}')
_PAIRS = _Inputs("a text", '("a text", "its pair")', '{"text": "a text", "text_pair": "its pair"}')
_IMAGES = _Inputs("an image", '"a.jpg", "another.png"', '{"text": "a.jpg"}', "tuning,images")


_OF_TEXTS = f"""import numpy as np
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer({{model}})
encoder.max_seq_length = {{max_tokens}}
features = encoder.encode([{_TEXTS.in_python}], normalize_embeddings=True)"""
_OF_IMAGES = f"""import numpy as np
from PIL import Image
from PIL import ImageOps
import torch
from transformers import AutoImageProcessor
from transformers import AutoModel

model = AutoModel.from_pretrained({{model}})
processor = AutoImageProcessor.from_pretrained({{model}}, backend="pil")
images = [ImageOps.exif_transpose(Image.open(path)) for path in [{_IMAGES.in_python}]]
inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
with torch.no_grad():
    found = model.get_image_features(**inputs).pooler_output
features = torch.nn.functional.normalize(found, dim=-1).numpy()"""


def model_card(
    state: ClassifierState, *, max_tokens: int | None = None, of_images: bool = False
) -> str:
    """A classifier's model card in Markdown.

    Args:
        state: The classifier.
        max_tokens: Where texts are cut, if its class matrix is exported, too.
        of_images: Whether it reads images; its class matrix is always exported.
    """
    inputs = _IMAGES if of_images else _PAIRS if state.facts.reads_pairs else _TEXTS
    parts = [
        f"---\nbase_model: {json.dumps(state.ensemble.model_name)}\n"
        f"library_name: optuna-llm-catalyst\npipeline_tag: {inputs.name}-classification\n---",
        f"# {inputs.one.capitalize()} classifier of tuned prompts",
        "\n".join(_facts(state, inputs)),
        _usage(inputs),
    ]
    if of_images or max_tokens is not None:
        parts.append(_with_a_matrix(state, inputs, max_tokens))
    if state.facts.table:
        # A record may hold anything: a page must not read HTML in it.
        parts.append("## Measured\n\n" + state.facts.table.strip().replace("<", "&lt;"))
    return "\n\n".join(parts) + "\n"


def _facts(state: ClassifierState, inputs: _Inputs) -> Iterator[str]:
    found, facts = state.ensemble, state.facts
    n_stages = len(found.numbers)
    fit = " and a linear fit pulled towards it" if facts.is_fitted else ""
    settings = f" ({_listed(facts.settings)})" if facts.settings else ""
    yield f"- Labels: {', '.join(map(_code, found.labels))}"
    yield (
        f"- Frozen model: {_code(found.model_name)}"
        f"{f' at the revision {_code(facts.revision)}' if facts.revision else ''}, with the "
        f"fingerprint {_code(found.fingerprint)}. It is not in this folder."
    )
    yield (
        f"- Made by: {n_stages} stages of prompt tuning with {_code(facts.task_model)}"
        f"{settings}; their uniform ensemble{fit}"
    )
    yield from (f"  - {_group(group, inputs)}" for group in found.groups)
    yield f"- Made with: {_listed(facts.versions)}"


def _group(group: Group, inputs: _Inputs) -> str:
    numbers = ", ".join(str(member.number) for member in group.members)
    plain = group.text_prompt is None
    reading = f"plain {inputs.name}s" if plain else f"{inputs.name}s behind a tuned prompt"
    return f"{reading}: weight {group.weight:.3g}, stages {numbers}"


def _usage(inputs: _Inputs) -> str:
    return f"""## How to use it

With `optuna-llm-catalyst[{inputs.extras}]` installed; the {inputs.name}s stay on the machine:

```python
from optuna_llm_catalyst.prompt_tuning import load_classifier

classifier = load_classifier("path/to/this/folder")
print(classifier.predict([{inputs.in_python}]))
print(classifier.predict_proba([{inputs.in_python}]))
```

```console
echo '{inputs.as_json}' | optuna-llm-catalyst predict path/to/this/folder
```"""


def _with_a_matrix(state: ClassifierState, inputs: _Inputs, max_tokens: int | None) -> str:
    found, revision = state.ensemble, state.facts.revision
    at = f", revision={revision!r}" if revision else ""
    features = _OF_IMAGES if max_tokens is None else _OF_TEXTS
    code = features.format(model=f"{found.model_name!r}{at}", max_tokens=max_tokens)
    library = "transformers, Pillow" if max_tokens is None else "sentence-transformers"
    return f"""## Without this package

`{MATRIX_NAME}` holds a row for each label: a vector and, as its last number, a bias. The
logits of {inputs.one} are its features' products with the vectors, plus the biases. With {library}
and NumPy alone:

```python
{code}
rows = np.load({MATRIX_NAME!r})
logits = features @ rows[:, :-1].T + rows[:, -1]
print(np.array({list(found.labels)!r})[logits.argmax(1)])
```"""


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{_code(name)} {_code(str(value))}" for name, value in values.items())


def _code(text: str) -> str:
    """A text as code, whatever it holds."""
    return f"`{one_line(text).replace('`', chr(39))}`"
