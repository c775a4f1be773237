from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
import pytest

from optuna_llm_catalyst import LLMCatalystSampler
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import StudyMismatchError
from optuna_llm_catalyst.study_check import check_trials
from tests.tokenizer_zoo import plain_ids
from tests.tokenizer_zoo import saved
from tests.tokenizer_zoo import SPECIAL
from tests.tokenizer_zoo import unigram
from tests.tokenizer_zoo import ZOO
from tests.toy_stage import run_python
from tests.toy_stage import word_space
from tests.toy_stage import WORDS
from tests.toy_stage import WordTokenizer


LENGTHS = st.sampled_from([1, 2, 3, 8, 11])
PIECES = [
    *(*WORDS[:8], *"[SEP] [MASK] [UNK] </s> <s> ##ing ## don't do n't 's unbelievably".split()),
    *("é", "e\u0301", "漢字", "🙂", "İ", "ß", "\ufffd", "▁", "Ġ", "-", "...", "12"),
    *(" ", "  ", "\n", "\t", "\u2028", "\x00"),
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join),
)


@pytest.fixture(scope="module", params=ZOO)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return ZOO[request.param]()


def with_a_token(tokenizer: Any, text: str) -> str:
    """The text, with a word that every tokenizer knows if it has no token of its own."""
    return text if plain_ids(tokenizer, text) else f"{text} calm"


@given(data=st.data(), length=LENGTHS)
def test_token_ids_and_params_are_the_same_thing(
    tokenizer: Any, data: st.DataObject, length: int
) -> None:
    space = PromptSpace(tokenizer, length)
    ids = st.integers(0, space.vocab_size - 1)
    token_ids = data.draw(st.lists(ids, min_size=length, max_size=length).map(tuple))
    prompt = space.from_token_ids(token_ids)
    params = space.to_params(prompt)
    assert space.decode(params) == prompt
    assert prompt.token_ids == token_ids
    assert params.keys() == space.search_space.keys()
    assert all(space.search_space[name]._contains(value) for name, value in params.items())


@given(text=TEXTS, length=LENGTHS)
@example(text=".", length=1)
@example(text="▁ ▁ ▁ ▁ ▁ ▁ ▁", length=11)
def test_the_text_that_is_kept_is_used(tokenizer: Any, text: str, length: int) -> None:
    space = PromptSpace(tokenizer, length)
    prompt = space.from_text(with_a_token(tokenizer, text))
    assert space.from_text(prompt.text) == prompt
    assert space.from_token_ids(prompt.token_ids) == prompt


@given(text=TEXTS, length=LENGTHS)
@example(text="calm [SEP] answer </s>", length=3)
def test_no_text_smuggles_a_special_token_in(tokenizer: Any, text: str, length: int) -> None:
    space = PromptSpace(tokenizer, length)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    prompt = space.from_text(with_a_token(tokenizer, text))
    assert special.isdisjoint(prompt.token_ids)


@given(text=TEXTS, length=LENGTHS)
def test_what_is_cut_and_what_is_padded_is_counted(tokenizer: Any, text: str, length: int) -> None:
    space = PromptSpace(tokenizer, length)
    text = with_a_token(tokenizer, text)
    prompt = space.from_text(text)
    n_tokens = len(plain_ids(tokenizer, text))
    assert prompt.n_truncated == max(0, n_tokens - length)
    assert prompt.n_padding == max(0, length - n_tokens)
    assert len(prompt.token_ids) == length


@pytest.mark.parametrize(
    ("text", "kept", "n_truncated", "n_padding"),
    [
        ("calm answer", "calm answer a", 0, 1),
        ("calm answer quick", "calm answer quick", 0, 0),
        ("calm answer quick topic label", "calm answer quick", 2, 0),
        ("unknown calm words", "calm a a", 0, 2),
    ],
)
def test_a_prompt_has_exactly_as_many_tokens_as_the_space(
    text: str, kept: str, n_truncated: int, n_padding: int
) -> None:
    prompt = word_space(3).from_text(text)
    assert prompt.text == kept
    assert (prompt.n_truncated, prompt.n_padding) == (n_truncated, n_padding)


def test_padding_leaves_the_words_before_it_as_they_are(tokenizer: Any) -> None:
    prompt = PromptSpace(tokenizer, 11).from_text("calm answer")
    assert prompt.n_padding > 0
    assert prompt.text.split() == ["calm", "answer", *["a"] * prompt.n_padding]


def test_the_padding_word_can_be_chosen() -> None:
    space = PromptSpace(WordTokenizer(), 3, padding="topic")
    assert space.from_text("calm").text == "calm topic topic"


@pytest.mark.parametrize("length", [1, 9, 10, 11, 100, 101])
def test_sorted_names_are_positions(length: int) -> None:
    names = word_space(length).param_names
    assert sorted(names) == list(names)
    assert [int(name.removeprefix("prompt[").removesuffix("]")) for name in names] == [
        *range(length)
    ]


def test_the_search_space_is_a_new_dict_of_integers() -> None:
    space = word_space(2)
    first = space.search_space
    assert first == dict.fromkeys(["prompt[0]", "prompt[1]"], IntDistribution(0, len(WORDS) - 1))
    first.clear()
    assert len(space.search_space) == 2


@pytest.mark.parametrize("kind", ["fixed", "frozen", "live", "enqueued"])
def test_suggesting_works_on_any_kind_of_trial(kind: str) -> None:
    space = word_space(3)
    params = space.to_params(space.from_text("calm answer quick"))
    study = optuna.create_study()
    if kind == "fixed":
        trial: Any = optuna.trial.FixedTrial(params)
    elif kind == "frozen":
        distributions = dict(space.search_space)
        trial = optuna.create_trial(params=params, distributions=distributions, value=1.0)
    else:
        if kind == "enqueued":
            space.enqueue(study, "calm answer quick")
        else:
            study.enqueue_trial(params)
        trial = study.ask()
    prompt = space.suggest(trial)
    assert prompt.text == "calm answer quick"
    assert trial.user_attrs["prompt"] == prompt.text
    assert space.decode(trial) == prompt


def test_padding_is_not_shown() -> None:
    space = word_space(5)
    study = optuna.create_study()
    space.enqueue(study, "calm answer")
    study.enqueue_trial(space.to_params(space.from_text("calm a quick")))
    study.enqueue_trial(space.to_params(space.from_text("a a a a a")))
    shown = []
    for _ in range(3):
        trial = study.ask()
        prompt = space.suggest(trial)
        assert space.suggest(trial) == prompt
        shown.append(trial.user_attrs["prompt"])
        study.tell(trial, 0.5)
    assert shown == ["calm answer", "calm a quick", "a a a a a"]
    check_trials(space, study.trials)


def test_the_shown_prompt_follows_a_trial_that_is_run_again_with_another() -> None:
    space = word_space(5)
    study = optuna.create_study()
    space.enqueue(study, "calm answer")
    space.suggest(study.ask())
    copied = study.trials[0]
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            user_attrs=copied.user_attrs,
            system_attrs={
                **copied.system_attrs,
                "fixed_params": space.to_params(space.from_text("silver river")),
            },
        )
    )
    trial = study.ask()
    space.suggest(trial)
    assert trial.user_attrs["prompt"] == "silver river"


def test_a_users_own_prompt_attribute_stays() -> None:
    space = word_space(3)
    study = optuna.create_study()
    prompt = space.from_text("calm answer quick")
    study.enqueue_trial(space.to_params(prompt), user_attrs={"prompt": "of March"})
    trial = study.ask()
    for _ in range(2):
        assert space.suggest(trial) == prompt
        assert trial.user_attrs["prompt"] == "of March"
    check_trials(space, study.trials)


def test_the_origin_of_enqueued_params_is_known() -> None:
    space = word_space(3)
    params = space.to_params(space.from_text("calm answer quick"))
    for sampler in (LLMCatalystSampler(space, startup_prompts=["calm"], seed=0), None):
        study = optuna.create_study(sampler=sampler)
        study.enqueue_trial(params)
        study.enqueue_trial({space.param_names[0]: 3})
        study.optimize(lambda trial: len(space.suggest(trial).text), n_trials=2)
        origins = [trial.user_attrs.get("origin") for trial in study.trials]
        assert origins == ["enqueued", "startup" if sampler else None]


def test_the_trial_of_a_finished_study_decodes_to_its_prompt() -> None:
    space = word_space(3)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = []

    def objective(trial: optuna.Trial) -> float:
        seen.append(space.suggest(trial))
        return 1.0

    study.optimize(objective, n_trials=5)
    assert [space.decode(trial) for trial in study.trials] == seen
    assert [trial.user_attrs["prompt"] for trial in study.trials] == [p.text for p in seen]
    check_trials(space, study.trials)


def test_an_enqueued_text_is_the_next_trial() -> None:
    space = word_space(3)
    study = optuna.create_study()
    prompt = space.enqueue(study, "calm answer quick topic", learning_rate=0.25)
    assert study.trials[0].state == TrialState.WAITING
    assert study.trials[0].user_attrs == {"prompt": prompt.text, "origin": "enqueued"}
    trial = study.ask()
    assert space.suggest(trial) == prompt == space.from_text("calm answer quick")
    assert trial.suggest_float("learning_rate", 0, 1) == 0.25


def test_whole_words_stand_for_themselves_behind_a_space(tokenizer: Any) -> None:
    space = PromptSpace(tokenizer, 3)
    words = space.whole_words
    assert len(words) > 50
    assert list(words) == sorted(words)
    assert space.words == tuple(words.values())
    special = set(getattr(tokenizer, "all_special_ids", ()))
    sample = dict(list(words.items())[:: max(1, len(words) // 300)])
    for token_id, word in sample.items():
        assert plain_ids(tokenizer, f"{word} {word}")[-1] == token_id
        assert word.isalpha() and word.isascii() and len(word) >= 3
        assert token_id not in special


def test_no_whole_word_is_passed_over() -> None:
    space = word_space(3, words=["a", "is", "12", "naïve", "calm", "re-do", "answer"])
    assert space.whole_words == {4: "calm", 6: "answer"}


def test_whole_words_are_the_same_in_another_process(tmp_path: Path) -> None:
    path = saved(tmp_path, unigram())
    code = (
        "import json\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "from optuna_llm_catalyst import PromptSpace\n"
        f"tokenizer = PreTrainedTokenizerFast(tokenizer_file={str(path)!r}, **{SPECIAL!r})\n"
        "print(json.dumps(list(PromptSpace(tokenizer, 3).whole_words.items())))\n"
    )
    # Python's own seed is random unless it is set: this one differs from ours in any case.
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    there = json.loads(run_python(code, "-W", "ignore", env={"PYTHONHASHSEED": seed}))
    here = PromptSpace(unigram(), 3).whole_words
    assert [tuple(item) for item in there] == list(here.items())


def test_the_size_of_a_vocabulary_counts_added_tokens(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = saved(tmp_path, unigram())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)
    before = PromptSpace(tokenizer, 1).vocab_size
    tokenizer.add_tokens(["zebracrossing"])
    space = PromptSpace(tokenizer, 1)
    assert space.vocab_size == before + 1
    assert space.from_text("zebracrossing").token_ids == (before,)


def study_of(space: PromptSpace) -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(lambda trial: float(len(space.suggest(trial).text)), n_trials=2)
    return study


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (word_space(4), r"Trial 0 has a prompt of 3 virtual tokens, this space 4\."),
        (word_space(2), r"Trial 0 has a prompt of 3 virtual tokens, this space 2\."),
        (word_space(12), r"Trial 0 has a prompt of 3 virtual tokens, this space 12\."),
        (
            word_space(3, WORDS[:-1]),
            rf"Trial 0 .* vocabulary of {len(WORDS)} tokens, this tokenizer has {len(WORDS) - 1}",
        ),
        (
            word_space(3, ["a", *reversed(WORDS[1:])]),
            r"Trial 0 started from '[a-z ]+', which this tokenizer reads as '[a-z ]+'",
        ),
    ],
)
def test_a_study_of_another_space_is_refused(other: PromptSpace, message: str) -> None:
    study = study_of(word_space(3))
    check_trials(word_space(3), study.trials)
    with pytest.raises(StudyMismatchError, match=message):
        check_trials(other, study.trials)


def test_trials_that_say_nothing_about_the_space_pass_the_check() -> None:
    space = word_space(3)
    study = study_of(space)
    study.ask().suggest_int("prompt[0]", 0, len(WORDS) - 1)  # Died after its first suggestion.
    failed = study.ask()
    failed.suggest_int("prompt[0]", 0, len(WORDS) - 1)
    study.tell(failed, state=TrialState.FAIL)
    other = study.ask()
    other.suggest_float("learning_rate", 0, 1)
    study.tell(other, 1.0)
    space.enqueue(study, "calm answer quick")
    check_trials(space, study.trials)
    check_trials(space, [])


class Sizeless:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 7 for c in text]

    def decode(self, token_ids: Any) -> str:
        return "".join(map(str, token_ids))


@pytest.mark.parametrize(
    ("tokenizer", "arguments", "message"),
    [
        (WordTokenizer(), {"num_virtual_tokens": 0}, "`num_virtual_tokens` .* 1 to 1000, got 0"),
        (WordTokenizer(), {"num_virtual_tokens": -3}, "`num_virtual_tokens` .* 1 to 1000, got -3"),
        # At once: names of so many parameters would take minutes.
        (WordTokenizer(), {"num_virtual_tokens": 10**9}, ".* 1 to 1000, got 1000000000"),
        (WordTokenizer(), {"vocab_size": 1}, "`vocab_size` must be at least 2, got 1"),
        (WordTokenizer(), {"padding": "qqq"}, "`padding` 'qqq' has no token"),
        (WordTokenizer(["calm", "answer"]), {}, "`padding` 'a' has no token"),
        (Sizeless(), {}, "Sizeless tells no vocabulary size .* pass `vocab_size=`"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    tokenizer: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSpace(tokenizer, **arguments)


def test_a_tokenizer_without_a_size_is_told_one() -> None:
    assert PromptSpace(Sizeless(), 2, vocab_size=7).from_token_ids([6, 0]).text == "60"


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ((1, 2), "`token_ids` must have 3 ids, got 2"),
        ((1, 2, 3, 4), "`token_ids` must have 3 ids, got 4"),
        ((1, -1, 3), rf"`token_ids` must be in \[0, {len(WORDS)}\), got \[-1\]"),
        ((1, len(WORDS), 999), rf"got \[{len(WORDS)}, 999\]"),
    ],
)
def test_token_ids_outside_the_space_are_refused(token_ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_space(3).from_token_ids(token_ids)


@pytest.mark.parametrize("text", ["", "   ", "qqq zzz"])
def test_a_text_without_a_token_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="has no token in this tokenizer's vocabulary"):
        word_space(3).from_text(text)


def test_params_of_a_shorter_prompt_are_refused() -> None:
    with pytest.raises(StudyMismatchError, match=r"\['prompt\[2\]'\] are missing"):
        word_space(3).decode({"prompt[0]": 1, "prompt[1]": 2})


def test_a_vocabulary_without_whole_words_says_so() -> None:
    with pytest.raises(ValueError, match="no whole words to draw from"):
        _ = PromptSpace(WordTokenizer(["1", "22", "333"]), 3, padding="1").words
