from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import copy
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import json
import math
import pickle
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst import ReplayProvider
from optuna_llm_catalyst.history import PastProposal
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import Proposal
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from optuna_llm_catalyst.providers.base import estimated_tokens
from optuna_llm_catalyst.records import MAX_TEXT
from tests.proposers.requests import ALL_SECTIONS
from tests.proposers.requests import full_history
from tests.proposers.requests import FULL_OPTIONS
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.toy_stage import reply as good_reply
from tests.toy_stage import texts
from tests.toy_stage import word_space


SPACE = word_space(3)
PAST_PROPOSALS = tuple(PastProposal(number, True) for number in range(5))
HISTORY = history_of(
    SPACE, [("calm answer quick", 0.1)], in_flight=["meadow gold"], proposals=PAST_PROPOSALS
)
REQUEST = request_of(SPACE, HISTORY, seed=11, trial_number=9)
USABLE = good_reply("silver river stone")
TOO_LONG = good_reply("silver river stone glass")
CHAT = "I'd rather not."
TRANSIENT = ProviderError("the line is busy", transient=True)
DEAD = ProviderError("the line is dead")

Answer = str | Completion | BaseException


@dataclass
class Script:
    """A provider that answers, or fails, in a given order; the last answer is the last."""

    answers: tuple[Answer, ...]
    seconds: float = 0.0
    max_prompt_tokens: int | None = None
    received: list[CompletionRequest] = field(default_factory=list)
    name: str = "script:test"

    def complete(self, request: CompletionRequest) -> Completion:
        self.received.append(request)
        time.sleep(self.seconds)
        answer = self.answers[min(len(self.received), len(self.answers)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return Completion(answer, "script-1") if isinstance(answer, str) else answer


def script(*answers: Answer, **options: Any) -> Script:
    return Script(answers, **options)


def propose(
    provider: Any, request: ProposalRequest = REQUEST, **options: Any
) -> tuple[Proposal, list[dict[str, Any]]]:
    proposal = LLMProposer(provider, "Sort messages.", **{"backoff": 0, **options}).propose(
        request
    )
    return proposal, proposal.details["attempts"]


def fail(
    provider: Any, request: ProposalRequest = REQUEST, **options: Any
) -> tuple[str, Mapping[str, Any]]:
    with pytest.raises(ProposalError) as caught:
        propose(provider, request, **options)
    return str(caught.value), caught.value.details


def meta(request: ProposalRequest = REQUEST) -> meta_prompt.MetaPrompt:
    return meta_prompt.build(
        request, MetaPromptOptions("Sort messages.", sections=DEFAULT_SECTIONS)
    )


# One reply.


def test_the_provider_is_asked_once_with_all_it_needs() -> None:
    provider = script(USABLE)
    propose(provider, replace(REQUEST, n_candidates=2), timeout=60)
    (received,) = provider.received
    assert 0 < received.timeout <= 60
    assert replace(received, timeout=60) == CompletionRequest(
        prompt=meta(replace(REQUEST, n_candidates=2)).text,
        schema=reply.schema(2, reply.pattern(SPACE)),
        seed=11,
        trial_number=9,
        proposal_index=5,
        attempt=0,
        timeout=60,
        max_tokens=reply.max_tokens(2, 3),
    )


def test_a_reply_that_was_cut_gets_all_room_next() -> None:
    cut = Completion('{"prompts": ["silver riv', "m", problem="it was cut at 120 tokens")
    provider = script(CHAT, cut, cut, USABLE)
    propose(provider, max_attempts=4)
    limits = [received.max_tokens for received in provider.received]
    assert limits == [reply.max_tokens(4, 3)] * 2 + [None, None]
    provider = script(cut)
    fail(provider, max_attempts=3)
    assert len(provider.received) == 3


def test_a_reply_becomes_candidates_in_its_order() -> None:
    texts = ["silver river stone", "calm answer", "qqq", "quick topic label"]
    proposal, _ = propose(script(good_reply(*texts)))
    assert [p.text for p in proposal.prompts] == [
        "silver river stone",
        "calm answer a",
        "quick topic label",
    ]
    assert [(p.n_truncated, p.n_padding) for p in proposal.prompts] == [(0, 0), (0, 1), (0, 0)]
    assert proposal.origin == "llm"


def test_no_more_candidates_are_taken_than_were_wanted() -> None:
    provider = script(good_reply("calm label", "quick label", "topic label"))
    proposal, _ = propose(provider, replace(REQUEST, n_candidates=2))
    assert [p.text for p in proposal.prompts] == ["calm label a", "quick label a"]


# The record.


def test_the_record_names_the_model_that_the_server_chose() -> None:
    @dataclass
    class Nameless(Script):
        def complete(self, request: CompletionRequest) -> Completion:
            self.name = "script:found"
            return super().complete(request)

    assert propose(Nameless((USABLE,)))[0].details["provider"] == "script:found"
    assert fail(Nameless((DEAD,)))[1]["provider"] == "script:found"


def test_a_pattern_that_cannot_be_made_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def pattern(space: Any) -> str:
        raise ValueError("odd vocabulary")

    monkeypatch.setattr(reply, "pattern", pattern)
    message, details = fail(script(USABLE))
    assert message == "ValueError: odd vocabulary"
    assert details["attempts"] == [{"seed": 11, "error": "odd vocabulary"}]


def test_the_record_tells_how_a_proposal_came_about() -> None:
    completion = Completion(USABLE, "script-1", details={"digest": "abc", "prompt_tokens": 12})
    proposal, attempts = propose(script(completion))
    assert attempts[0].pop("seconds") >= 0
    assert proposal.details == {
        "proposer": "llm",
        "provider": "script:test",
        **meta().facts(),
        "meta_prompt": meta().text,
        "attempts": [
            {
                "digest": "abc",
                "prompt_tokens": 12,
                "seed": 11,
                "tries": 1,
                "model": "script-1",
                "reply": USABLE,
                "problem": "",
                "rejected": [],
            }
        ],
    }
    assert json.loads(json.dumps(proposal.details)) == proposal.details


@pytest.mark.parametrize("answer", [USABLE, TOO_LONG])
def test_a_problem_that_the_server_tells_is_recorded(
    answer: str,
) -> None:
    _, attempts = propose(
        script(Completion(answer, "m", problem="the reply was cut")), max_attempts=1
    )
    assert len(attempts) == 1
    assert attempts[0]["server_problem"] == "the reply was cut"
    assert (attempts[0]["problem"] == "the reply was cut") is (answer == USABLE)


def test_what_a_provider_tells_does_not_hide_what_was_seen() -> None:
    details = {"seed": -1, "reply": "mine", "problem": "mine", "nan": math.nan, "set": {1}}
    _, attempts = propose(script(Completion(USABLE, "m", details=details)))
    assert (attempts[0]["seed"], attempts[0]["reply"], attempts[0]["problem"]) == (11, USABLE, "")
    json.dumps(attempts, allow_nan=False)


@pytest.mark.parametrize("answer", [USABLE, CHAT])
def test_a_very_long_reply_is_clipped_in_the_record(answer: str) -> None:
    text = answer + " " * MAX_TEXT
    _, details = fail(script(text))
    for row in details["attempts"]:
        assert len(row["reply"]) < MAX_TEXT + 100
        assert row["reply"].endswith("characters cut]")


def test_a_reply_that_can_be_read_is_kept_whole() -> None:
    text = USABLE.ljust(MAX_TEXT)
    _, attempts = propose(script(text))
    assert attempts[0]["reply"] == text


# Replies of no use, and ways that fail.


def recorded(attempts: list[dict[str, Any]]) -> list[str]:
    return [row.get("error") or row["problem"].partition(":")[0] for row in attempts]


@pytest.mark.parametrize(
    ("answers", "max_attempts", "n_attempts"),
    [
        ((USABLE,), 3, 1),
        ((CHAT, USABLE), 3, 2),
        ((CHAT, good_reply("qqq"), USABLE), 3, 3),
        ((good_reply("calm answer quick"), USABLE), 2, 2),
        ((TOO_LONG, USABLE), 3, 2),
        ((CHAT, TRANSIENT, USABLE), 2, 2),
    ],
)
def test_asks_stop_at_the_first_reply_that_is_of_use(
    answers: tuple[Answer, ...], max_attempts: int, n_attempts: int
) -> None:
    provider = script(*answers, CHAT)
    proposal, attempts = propose(provider, max_attempts=max_attempts)
    assert [p.text for p in proposal.prompts] == ["silver river stone"]
    assert len(attempts) == n_attempts
    assert len(provider.received) == len(answers)
    assert attempts[-1]["reply"] == USABLE


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
def test_asks_stop_at_their_number(max_attempts: int) -> None:
    provider = script(CHAT)
    message, details = fail(provider, max_attempts=max_attempts)
    assert "InvalidReplyError: the reply has no object" in message
    assert len(provider.received) == len(details["attempts"]) == max_attempts
    assert [received.attempt for received in provider.received] == list(range(max_attempts))
    assert [row["reply"] for row in details["attempts"]] == [CHAT] * max_attempts


@pytest.mark.parametrize(
    ("answers", "n_tries"),
    [((DEAD,), 1), ((TRANSIENT,), 3), ((TRANSIENT, DEAD), 2)],
)
def test_only_a_transient_failure_is_tried_again(
    answers: tuple[Answer, ...], n_tries: int
) -> None:
    provider = script(*answers)
    message, details = fail(provider)
    assert message.startswith(f"ProviderError: {answers[-1]}")
    assert ("tried" in message) is (n_tries > 1)
    assert len(provider.received) == n_tries
    assert len({(received.prompt, received.seed) for received in provider.received}) == 1
    assert len(details["attempts"]) == 1
    assert details["meta_prompt"] == meta().text


def test_a_failure_after_a_useless_reply_is_final() -> None:
    provider = script(CHAT, DEAD, USABLE)
    message, details = fail(provider)
    assert message == "ProviderError: the line is dead"
    assert recorded(details["attempts"]) == ["InvalidReplyError", "the line is dead"]


def test_a_retry_repeats_the_request_and_an_attempt_changes_it() -> None:
    provider = script(TRANSIENT, CHAT, TRANSIENT, CHAT, USABLE)
    _, attempts = propose(provider)
    first, retried, second, retried_too, third = provider.received
    for one, two in ((first, retried), (second, retried_too)):
        assert two.timeout <= one.timeout
        assert replace(one, timeout=0) == replace(two, timeout=0)
    assert [first.attempt, second.attempt, third.attempt] == [0, 1, 2]
    assert len({first.seed, second.seed, third.seed}) == 3
    assert first.timeout >= second.timeout >= third.timeout
    assert [row["tries"] for row in attempts] == [2, 2, 1]
    assert [row["seed"] for row in attempts] == [first.seed, second.seed, third.seed]


@given(seed=st.integers(0, 2**31 - 1))
def test_seeds_of_later_attempts_derive_from_the_first(seed: int) -> None:
    runs = []
    for _ in range(2):
        provider = script(CHAT)
        fail(provider, replace(REQUEST, seed=seed), max_attempts=4)
        runs.append([received.seed for received in provider.received])
    assert runs[0] == runs[1]
    assert runs[0][0] == seed
    later = [np.random.SeedSequence([seed, i]).generate_state(1)[0] for i in (1, 2, 3)]
    assert runs[0][1:] == [int(value) % 2**31 for value in later]
    assert all(isinstance(value, int) and 0 <= value < 2**31 for value in runs[0])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (CHAT, "the reply has no object"),
        (" ", "the reply is empty"),
        ('{"prompts": []}', "the reply's list of prompts is empty"),
        (good_reply("qqq", "zzz"), "no word of it is in the vocabulary (2)"),
        (good_reply("...", "calm"), "it repeats the example of the form (1), it needs two common"),
        (good_reply("calm answer quick", "zzz"), "it was tried before (1), no word of it"),
        (TOO_LONG, "it is 1 tokens too long (1)"),
        (Completion("", "m", problem="num_predict was reached"), "num_predict was reached"),
        ("x" * 2_000, "the reply has no object"),
    ],
)
def test_the_next_prompt_ends_with_what_was_wrong(answer: Answer, told: str) -> None:
    provider = script(answer, USABLE)
    _, attempts = propose(provider)
    first, second = provider.received
    assert first.prompt == meta().text
    assert second.prompt.startswith(f"{meta().text}\n\nYour last answer could not be used: ")
    correction = second.prompt.removeprefix(meta().text)
    assert told in correction
    assert told in attempts[0]["problem"]
    assert correction.endswith("\nAnswer again, with other prompts, and with JSON only.")
    assert len(correction) < 500


def test_only_the_last_problem_is_told() -> None:
    provider = script(CHAT, good_reply("qqq"), USABLE)
    propose(provider)
    assert "no object" in provider.received[1].prompt
    assert "no object" not in provider.received[2].prompt
    assert "no word of it" in provider.received[2].prompt


@pytest.mark.parametrize("seconds", [0.06, 0.15])
def test_attempts_stop_when_the_time_is_over(seconds: float) -> None:
    provider = script(CHAT, seconds=seconds)
    message, details = fail(provider, timeout=0.2, max_attempts=100)
    assert 1 <= len(provider.received) <= 4
    assert message.startswith("InvalidReplyError")
    assert message.endswith("; the 0.2 s for a proposal are over")
    assert len(details["attempts"]) == len(provider.received)
    assert all(0 < received.timeout <= 0.2 for received in provider.received)


def test_pauses_and_retries_count_for_the_time_as_well() -> None:
    provider = script(CHAT, TRANSIENT)
    message, _ = fail(provider, timeout=0.3, backoff=0.2, max_tries=50, max_attempts=50)
    assert message.startswith("ProviderError: the line is busy")
    assert len(provider.received) <= 4


def test_there_is_time_for_one_attempt() -> None:
    proposal, _ = propose(script(USABLE), timeout=1e-9)
    assert proposal.prompts


# Prompts that had to be cut.


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param((TOO_LONG,), id="too long each time"),
        pytest.param((CHAT, TOO_LONG), id="too long in the end"),
        pytest.param((TOO_LONG, DEAD), id="then the way fails"),
        pytest.param((TOO_LONG, RuntimeError("oops")), id="then the provider raises"),
        pytest.param((TOO_LONG, CHAT), id="then of no use"),
        pytest.param((TOO_LONG, good_reply("qqq")), id="then unknown words"),
    ],
)
def test_prompts_that_had_to_be_cut_are_the_last_resort(answers: tuple[Answer, ...]) -> None:
    proposal, attempts = propose(script(*answers), max_attempts=3)
    assert len(attempts) >= 2
    (prompt,) = proposal.prompts
    assert (prompt.text, prompt.n_truncated) == ("silver river stone", 1)
    told = [row["rejected"] for row in attempts if row.get("rejected")]
    assert [["silver river stone glass", "it is 1 tokens too long"]] in told


def test_a_prompt_that_fits_goes_before_a_cut_one() -> None:
    proposal, attempts = propose(script(good_reply("silver river stone glass", "calm topic")))
    assert [p.text for p in proposal.prompts] == ["calm topic a", "silver river stone"]
    assert len(attempts) == 1


# Providers of third parties.


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (KeyError("choices"), "KeyError: 'choices'"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (TimeoutError(), "TimeoutError: "),
        (AssertionError("a\nb\x1b[2J"), "AssertionError: a b [2J"),
        (MemoryError(), "MemoryError: "),
        (StopIteration(), "StopIteration: "),
        (ProviderError("the line is dead"), "ProviderError: the line is dead"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("n_replies", [0, 1])
def test_whatever_a_provider_raises_is_a_failure(
    error: Exception, message: str, n_replies: int
) -> None:
    reason, details = fail(script(*[CHAT] * n_replies, error))
    assert reason == message
    assert details["meta_prompt"] == meta().text
    assert details["provider"] == "script:test"
    assert len(details["attempts"]) == n_replies + 1
    assert details["attempts"][-1]["error"] == message.partition(": ")[2]
    assert isinstance(details["attempts"][-1]["seed"], int)
    json.dumps(details, allow_nan=False)


def test_an_error_of_a_provider_is_clipped_in_the_record() -> None:
    reason, details = fail(script(RuntimeError("x" * 10 * MAX_TEXT)))
    assert len(json.dumps(details["attempts"])) < 2 * MAX_TEXT
    assert len(reason) < 2 * MAX_TEXT


@pytest.mark.parametrize("completion", [Completion(None, "m"), None, "a text"])  # type: ignore[arg-type]
def test_what_is_no_completion_is_a_failure(completion: Any) -> None:
    class Careless:
        name = "careless:test"
        max_prompt_tokens = None

        def complete(self, request: CompletionRequest) -> Any:
            return completion

    reason, details = fail(Careless())
    assert "Error: " in reason
    assert details["meta_prompt"] == meta().text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_passed_on(error: type[BaseException]) -> None:
    with pytest.raises(error):
        propose(script(error()))
    with pytest.raises(error):
        propose(script(CHAT, error()))


# The LLM's context.


def longest(request: ProposalRequest, max_prompt_tokens: int, **options: Any) -> int:
    """The estimated length of the longest prompt that is really sent."""
    provider = script(*options.pop("answers"), max_prompt_tokens=max_prompt_tokens)
    fail(provider, request, **options)
    assert len(provider.received) == 3
    return max(estimated_tokens(received.prompt) for received in provider.received)


FULL = request_of(SPACE, full_history(SPACE, 9))
LATIN = (CHAT, "x" * 2_000, Completion("", "m", problem="why? " * 500))
FOREIGN = (
    pytest.param("对不起，我不能回答这个问题。" * 50, id="Chinese"),
    pytest.param("🙂" * 200, id="emoji"),
    pytest.param(Completion("", "m", problem="ответ обрезан " * 50), id="Russian"),
)


@given(max_prompt_tokens=st.integers(550, 1_500), names=st.sets(st.sampled_from(ALL_SECTIONS)))
def test_no_prompt_is_longer_than_the_context(max_prompt_tokens: int, names: set[str]) -> None:
    length = longest(FULL, max_prompt_tokens, answers=LATIN, sections=tuple(names))
    assert length <= max_prompt_tokens


@pytest.mark.parametrize("answer", FOREIGN)
def test_no_correction_is_longer_than_the_context(answer: Answer) -> None:
    # The tightest of some budgets, so that the meta-prompt itself leaves nothing free.
    over = [
        longest(FULL, most, answers=(answer,), sections=ALL_SECTIONS) - most
        for most in range(700, 1_200, 20)
    ]
    assert max(over) <= 0


def test_the_meta_prompt_leaves_room_for_a_correction() -> None:
    provider = script(USABLE, max_prompt_tokens=900)
    proposal, _ = propose(provider, FULL, sections=ALL_SECTIONS)
    assert proposal.details["max_prompt_tokens"] < 900 - estimated_tokens("z" * 300)
    assert proposal.details["estimated_prompt_tokens"] <= proposal.details["max_prompt_tokens"]
    assert proposal.details["n_dropped_points"] > 0


def test_instructions_that_do_not_fit_are_a_failure() -> None:
    provider = script(USABLE, max_prompt_tokens=300)
    message, details = fail(provider)
    assert "the instructions alone" in message
    assert "num_ctx" in message
    assert provider.received == []
    assert details["provider"] == "script:test"


# Configuration.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sections": "task"}, "`sections` must be a list of names among task, .*, got 'task'"),
        ({"sections": ["task", "tasks"]}, "`sections` must be a list of names among task, "),
        ({"edit_horizon": 0}, "`edit_horizon` must be at least 1, got 0"),
        ({"n_validation": 0}, "`n_validation` must be at least 1, got 0"),
        ({"n_stages": 0}, "`n_stages` must be at least 1, got 0"),
        ({"max_attempts": 0}, "`max_attempts` must be at least 1, got 0"),
        ({"max_tries": 0}, "`max_tries` must be at least 1, got 0"),
        ({"backoff": -0.1}, "`backoff` must be at least 0, got -0.1"),
        ({"backoff": math.nan}, "`backoff` must be at least 0, got nan"),
        ({"timeout": 0}, "`timeout` must be a positive number of seconds, got 0"),
        ({"timeout": -1}, "`timeout` must be a positive number of seconds, got -1"),
        ({"timeout": math.inf}, "`timeout` must be a positive number of seconds, got inf"),
        ({"timeout": math.nan}, "`timeout` must be a positive number of seconds, got nan"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMProposer(script(USABLE), **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"labels": "billing"}, "labels"),
        ({"examples": "My card was charged twice."}, "examples"),
        ({"examples": [("My card was charged twice.",)]}, "examples"),
    ],
)
def test_labels_and_examples_that_cannot_be_used_are_named(
    options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        LLMProposer(script(USABLE), **options)


def test_the_llm_is_told_all_options() -> None:
    provider = script(USABLE)
    propose(
        provider,
        FULL,
        labels=FULL_OPTIONS.labels,
        examples=FULL_OPTIONS.examples,
        mechanism=FULL_OPTIONS.mechanism,
        n_validation=FULL_OPTIONS.n_validation,
        n_stages=FULL_OPTIONS.n_stages,
        sections=list(reversed(ALL_SECTIONS)),
        edit_horizon=3,
    )
    options = replace(FULL_OPTIONS, task_description="Sort messages.", edit_horizon=3)
    assert provider.received[0].prompt == meta_prompt.build(FULL, options).text


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_a_copy_proposes_the_same(copied: Callable[[LLMProposer], LLMProposer]) -> None:
    rows = [CHAT, TOO_LONG, good_reply("silver river", "calm river")]
    proposer = LLMProposer(
        script(*rows), "Sort messages.", labels=["billing"], sections=ALL_SECTIONS, backoff=0
    )
    twin = copied(proposer)
    if twin._provider is proposer._provider:  # A shallow copy shares it: both go on with it.
        twin._provider = script(*rows)  # type: ignore[attr-defined]
    one, two = (each.propose(copy.deepcopy(FULL)) for each in (proposer, twin))
    for proposal in (one, two):
        for row in proposal.details["attempts"]:
            del row["seconds"]
    assert one == two
    assert len(one.details["attempts"]) == 3


def test_a_proposal_leaves_nothing_behind() -> None:
    proposer = LLMProposer(ReplayProvider([USABLE]))
    request = replace(REQUEST, history=replace(HISTORY, proposals=()))
    before = pickle.dumps(proposer)
    first = proposer.propose(request)
    assert pickle.dumps(proposer) == before
    assert proposer.propose(request).prompts == first.prompts


def test_a_list_has_one_reply_for_each_proposal() -> None:
    provider = ReplayProvider([CHAT, USABLE])
    first, second = (replace(HISTORY, proposals=PAST_PROPOSALS[:n]) for n in (0, 1))
    message, details = fail(provider, replace(REQUEST, history=first))
    assert "list has no reply to attempt 1 of trial 9" in message
    assert details["attempts"][0]["reply"] == CHAT
    proposal, _ = propose(provider, replace(REQUEST, history=second))
    assert [p.text for p in proposal.prompts] == ["silver river stone"]


def test_the_record_counts_the_prompts_that_were_shown() -> None:
    history = history_of(SPACE, [(text, 0.5) for text in texts(20)])
    proposal, _ = propose(script(good_reply("yellow young")), request_of(SPACE, history))
    assert proposal.details["n_points"] == 20
    assert proposal.details["meta_prompt"].count("loss 0.500") == 20
