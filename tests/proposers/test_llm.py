from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any

import pytest

from optuna_llm_catalyst import LLMProposer
from optuna_llm_catalyst import ProviderError
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers import Completion
from optuna_llm_catalyst.providers import CompletionRequest
from tests.proposers.requests import history_of
from tests.proposers.requests import request_of
from tests.toy_stage import reply as good_reply
from tests.toy_stage import word_space


SPACE = word_space(3)
HISTORY = history_of(SPACE, [("calm answer quick", 0.1)], n_llm_calls=5)


class Scribe:
    """A provider that keeps what it is asked and answers the same each time."""

    name = "scribe:test"

    def __init__(self, text: str, details: Mapping[str, Any] | None = None) -> None:
        self.asked: list[CompletionRequest] = []
        self._completion = Completion(text, "scribe-1", details or {})

    def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(request)
        return self._completion


class Broken:
    name = "broken:test"

    def complete(self, request: CompletionRequest) -> Completion:
        raise ProviderError("the line is dead")


def test_the_provider_is_asked_once_with_all_it_needs() -> None:
    scribe = Scribe(good_reply("silver river stone"))
    request = request_of(SPACE, HISTORY, n_candidates=2, seed=11, trial_number=9)
    LLMProposer(scribe, "Sort messages.").propose(request)
    assert scribe.asked == [
        CompletionRequest(
            prompt=meta_prompt.build(request, "Sort messages."),
            schema=reply.schema(2),
            seed=11,
            trial_number=9,
            call_index=5,
        )
    ]


def test_a_reply_becomes_candidates_in_its_order() -> None:
    provider = Scribe(
        good_reply("silver river stone glass", "calm", "qqq zzz", "quick topic label")
    )
    proposal = LLMProposer(provider).propose(request_of(SPACE, HISTORY, n_candidates=4))
    assert [p.text for p in proposal.prompts] == [
        "silver river stone",
        "calm a a",
        "quick topic label",
    ]
    assert [(p.n_truncated, p.n_padding) for p in proposal.prompts] == [(1, 0), (0, 2), (0, 0)]
    assert proposal.origin == "llm"


def test_no_more_candidates_are_taken_than_were_wanted() -> None:
    provider = Scribe(good_reply("calm", "quick", "topic"))
    proposal = LLMProposer(provider).propose(request_of(SPACE, HISTORY, n_candidates=2))
    assert [p.text for p in proposal.prompts] == ["calm a a", "quick a a"]


def test_the_record_tells_how_a_proposal_came_about() -> None:
    text = good_reply("silver river stone")
    provider = Scribe(text, {"digest": "abc", "prompt_tokens": 12})
    request = request_of(SPACE, HISTORY, seed=11)
    details = LLMProposer(provider, "Sort messages.").propose(request).details
    assert details == {
        "proposer": "llm",
        "provider": "scribe:test",
        "model": "scribe-1",
        "seed": 11,
        "template_version": meta_prompt.VERSION,
        "meta_prompt": meta_prompt.build(request, "Sort messages."),
        "reply": text,
        "digest": "abc",
        "prompt_tokens": 12,
    }
    assert json.loads(json.dumps(details)) == details


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (Broken(), "ProviderError: the line is dead"),
        (Scribe("I'd rather not."), "InvalidReplyError: the reply has no object"),
        (Scribe('{"prompts": []}'), "InvalidReplyError: the reply's list of prompts is empty"),
        (Scribe(good_reply("qqq", "zzz")), "no candidate has a token"),
    ],
)
def test_a_failure_tells_the_reason_and_what_was_asked(
    provider: Scribe | Broken, reason: str
) -> None:
    request = request_of(SPACE, HISTORY, seed=11)
    with pytest.raises(ProposalError, match=reason) as caught:
        LLMProposer(provider, "Sort messages.").propose(request)
    details = caught.value.details
    assert details["meta_prompt"] == meta_prompt.build(request, "Sort messages.")
    assert details["provider"] == provider.name
    if isinstance(provider, Scribe):
        assert details["reply"] == provider.complete(provider.asked[0]).text


def test_a_reply_too_long_to_keep_is_clipped_in_the_record() -> None:
    text = good_reply("silver river stone") + " " * 20_000
    details = LLMProposer(Scribe(text)).propose(request_of(SPACE, HISTORY)).details
    assert len(details["reply"]) < 16_100
    assert details["reply"].endswith("characters cut]")
