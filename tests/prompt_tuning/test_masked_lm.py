"""A masked language model as a classifier gives what the whole model gives, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.artifacts import FileSystemArtifactStore
import pytest
import torch
from torch import nn
from torch import Tensor
import transformers

from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst.prompt_tuning import CausalLMClassifier
from optuna_llm_catalyst.prompt_tuning import DeepPrompt
from optuna_llm_catalyst.prompt_tuning import Example
from optuna_llm_catalyst.prompt_tuning import load_classifier
from optuna_llm_catalyst.prompt_tuning import load_pretrained
from optuna_llm_catalyst.prompt_tuning import MaskedLMClassifier
from optuna_llm_catalyst.prompt_tuning import Pretrained
from optuna_llm_catalyst.prompt_tuning import PromptTuningObjective
from optuna_llm_catalyst.prompt_tuning.models.lm_head import WordHead
from optuna_llm_catalyst.prompt_tuning.stages import BlackBoxStage
from optuna_llm_catalyst.prompt_tuning.stages import Run

from .test_families import FAMILIES
from .tiny import LABELS
from .tiny import make_examples
from .tiny import make_task
from .tiny import tiny_stage


WORDS = {"wild_animal": ["wolf", "animal"], "food": ["food"], "tool": ["tool", "saw", "drill"]}
WITH_A_HEAD = [
    name
    for name, (kind, *_) in FAMILIES.items()
    if hasattr(transformers, f"{kind}ForMaskedLM") and name != "xlnet"
]
#: Of the families of the field, whole classifiers; of all others the head alone.
CLASSIFIERS = ("bert", "roberta", "deberta-v2", "modernbert", "distilbert", "mpnet")


def make(family: str) -> tuple[Any, Any]:
    """A tiny random masked language model and its tokenizer, which has a mask token."""
    kind, config, make_tokenizer = FAMILIES[family]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    own = {**config, "vocab_size": config["vocab_size"] + 1}
    own |= {"cls_token_id": 2} if family == "modernbert" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForMaskedLM")(
            getattr(transformers, f"{kind}Config")(**own)
        )
        for name, weights in model.named_parameters():
            if name.endswith("bias"):  # Zero at the start of a training: it would not show.
                nn.init.normal_(weights)
    return model.eval(), tokenizer


def classifier(family: str = "bert", **options: Any) -> MaskedLMClassifier:
    model, tokenizer = make(family)
    options = {"verbalizers": WORDS, "max_virtual_tokens": 6, "max_length": 12} | options
    return MaskedLMClassifier(Pretrained.of(model, tokenizer), LABELS, **options)


@torch.no_grad()
def slowly(
    model: MaskedLMClassifier, lm: Any, prompts: Sequence[Sequence[int]], split: Any
) -> Tensor:
    """The whole model on real tokens, one sequence a pass: (P, B, C)."""
    tokenizer, offset = model.pretrained.tokenizer, model._offset
    found = []
    for ids in prompts:
        for row, mask in zip(
            split.rows("input_ids").tolist(), split.rows("attention_mask").tolist(), strict=True
        ):
            row = row[: sum(mask)]
            whole = [*row[:offset], *ids, *row[offset:]]
            logits = lm(input_ids=torch.tensor([whole])).logits[0]  # (T, V)
            at = whole.index(tokenizer.mask_token_id)
            words = [
                torch.stack([logits[at, tokenizer.convert_tokens_to_ids(w)] for w in WORDS[label]])
                for label in LABELS
            ]
            found.append(torch.stack([w.mean() for w in words]).log_softmax(-1))
    return torch.stack(found).view(len(prompts), len(split), -1)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_it_is_the_whole_model_on_real_tokens(family: str) -> None:
    model = classifier(family)
    lm = model.pretrained.language_model
    split = model.encode(make_examples(5, seed=3))
    ids = [[7, 9, 30], [12, 12, 5]]
    prompt = model.start(ids, split)
    torch.testing.assert_close(
        model.log_probs(prompt, split), slowly(model, lm, ids, split), atol=1e-4, rtol=1e-4
    )
    some = split.select([3, 1])
    torch.testing.assert_close(
        model.log_probs(prompt, some), slowly(model, lm, ids, some), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", WITH_A_HEAD)
def test_a_cut_head_gives_the_logits_of_the_whole_one(family: str) -> None:
    model, _ = make(family)
    ids = torch.tensor([[2, 5, 9, 7, 8, 3], [2, 6, 4, 11, 10, 3]])
    head = WordHead(model, [9, 5, 20])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, 3]
        expected = model(input_ids=ids).logits[:, 3][:, [9, 5, 20]]
        torch.testing.assert_close(head(hidden), expected, atol=1e-4, rtol=1e-4)
    n_weights = sum(p.numel() for p in head.parameters())
    assert n_weights < sum(p.numel() for p in model.parameters())


def test_the_head_is_evaluated_at_the_mask_for_the_words_alone() -> None:
    model = classifier()
    split = model.encode(make_examples(4, seed=3))
    shapes = []
    model._words.register_forward_hook(
        lambda _, args, out: shapes.append((args[0].shape, out.shape))
    )
    model.log_probs(model.start([[7, 9]] * 3, split), split)
    assert shapes == [((12, 32), (12, 6))]


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_prompt_of_it_can_be_trained(kind: str) -> None:
    model = classifier()
    train = model.encode(make_examples(18, seed=1))
    prompts = {} if kind == "soft" else {"kind": DeepPrompt()}
    start = model.start([[7, 9, 30]], train, **prompts)
    weights = {n: t.clone() for n, t in model.pretrained.language_model.state_dict().items()}
    for stage in (
        tiny_stage(n_steps=20),
        BlackBoxStage(n_queries=41, population_size=5, intrinsic_dim=9, alpha=0.3),
    ):
        result = stage.run(Run(model, start, train, train))
        assert result.best.step > 0
    after = model.pretrained.language_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_a_long_text_is_cut_and_the_template_is_not() -> None:
    model = classifier()
    long = Example("bread " * 200, 0)
    split = model.encode([long, Example("bread", 0)])
    ids = split.rows("input_ids")
    assert (ids == model.pretrained.tokenizer.mask_token_id).sum(1).tolist() == [1, 1]
    room = model._n_positions - model.placement.max_virtual_tokens
    assert max(split.lengths) <= room
    assert (ids[0] == model.pretrained.tokenizer.convert_tokens_to_ids("bread")).sum() == 12
    prompt = model.start([[7] * 6], split)
    assert model.log_probs(prompt, split).isfinite().all()


def test_both_texts_of_a_pair_are_read() -> None:
    model = classifier(template="{text} {mask} {text_pair}")
    one, two = (model.encode([Example("bread", 0, text)]) for text in ("wolf", "saw"))
    prompt = model.start([[7, 9]], one)
    assert not torch.allclose(model.log_probs(prompt, one), model.log_probs(prompt, two))


def assert_a_study_is_used_as_any_other(
    kind: type[CausalLMClassifier] | type[MaskedLMClassifier],
    parts: tuple[Any, Any],
    verbalizers: dict[str, list[str]],
    folder: Path,
) -> None:
    """From the folder of a model, made of it and its tokenizer, to a classifier loaded again."""
    for part in parts:
        part.save_pretrained(folder / "model")
    pretrained = load_pretrained(str(folder / "model"), head=kind.head)
    task_model = kind(
        pretrained, LABELS, verbalizers=verbalizers, max_virtual_tokens=6, max_length=12
    )
    (folder / "store").mkdir()
    objective = PromptTuningObjective(
        task_model,
        make_task(),
        PromptSpace(parts[1], 3),
        stage=tiny_stage(n_steps=2),
        artifact_store=FileSystemArtifactStore(str(folder / "store")),
        n_checked_swaps=1,
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=2)
    made = objective.classifier(study)
    made.save(folder / "classifier.safetensors")
    found = load_classifier(folder / "classifier.safetensors")
    texts = [example.text for example in make_task().test]
    assert np.array_equal(found.predict_proba(texts), made.predict_proba(texts))
    assert isinstance(found.model, kind)
    assert found.model.verbalizers == task_model.verbalizers
    assert found.model.fingerprint == task_model.fingerprint


def test_a_study_of_it_is_used_as_any_other(tmp_path: Path) -> None:
    assert_a_study_is_used_as_any_other(MaskedLMClassifier, make("bert"), WORDS, tmp_path)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no blank": (
        {"template": "{text} is"},
        "`template` must have {text} and {mask} and may .*each once",
    ),
    "two blanks": ({"template": "{text} {mask} {mask}"}, "each once"),
    "a field": ({"template": "{text} {mask} {label}"}, "`template` may have"),
    "a label less": ({"verbalizers": {"food": ["food"]}}, "must have words for each of"),
    "no words": ({"verbalizers": {**WORDS, "food": []}}, "must have words for each of"),
    "not a word": ({"verbalizers": {**WORDS, "food": ["foods"]}}, "'foods' is the tokens"),
    "an unknown word": ({"verbalizers": {**WORDS, "food": ["xyz"]}}, "'xyz' is the tokens"),
    "two words": ({"verbalizers": None}, "'wild animal' is the tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_a_text_with_a_blank_of_its_own_is_named() -> None:
    with pytest.raises(ValueError, match="'bread \\[MASK\\]' holds the mask token itself"):
        classifier().encode([Example("bread [MASK]", 0)])


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    model, tokenizer = make("bert")
    with pytest.raises(ValueError, match='load_pretrained\\(name, head="masked-lm"\\)'):
        MaskedLMClassifier(Pretrained.of(model.base_model, tokenizer), LABELS)
    model.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not match its config.json"):
        load_pretrained(str(tmp_path), head="masked-lm")
