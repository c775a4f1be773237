"""The interface between the sampler and proposers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import time
from typing import Any
from typing import Protocol

import optuna

from optuna_llm_catalyst import records
from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt


_logger = optuna.logging.get_logger(f"optuna.{__name__}")


@dataclass(frozen=True)
class ProposalRequest:
    """What is requested of a proposer.

    Attributes:
        space: The space of the prompts.
        history: The study so far.
        n_candidates: How many prompts are wanted.
        seed: Non-negative 31-bit seed; one seed gives one proposal, as far as that can be.
        trial_number: The trial that will start from one of them.
        fixed: Token ids by position, given by an enqueued trial or by Optuna's
            ``PartialFixedSampler``. Every prompt of the proposal has them.
        screened: Whether the prompt with the best value before training is taken, not the first.
    """

    space: PromptSpace
    history: History
    n_candidates: int
    seed: int
    trial_number: int
    fixed: Mapping[int, int] = field(default_factory=dict)
    screened: bool = False


@dataclass(frozen=True)
class Proposal:
    """What a proposer gives for one trial.

    Attributes:
        prompts: Candidates, best guess first; fewer than requested are allowed.
        origin: How they came about: ``llm``, ``mutation``, …
        details: JSON-able facts for the trial's record.
    """

    prompts: tuple[RestartPrompt, ...]
    origin: str
    details: Mapping[str, Any] = field(default_factory=dict)


class ProposalError(CatalystError):
    """A proposer has nothing to propose.

    Args:
        reason: Why, in one sentence.
        details: What is known nevertheless, for the record.
    """

    def __init__(self, reason: str, details: Mapping[str, Any]) -> None:
        super().__init__(reason)
        self.details = details


class Proposer(Protocol):
    """Turns a study's history into candidates for the next restart.

    It holds configuration only: it survives pickling and remembers no earlier request.
    """

    def propose(self, request: ProposalRequest) -> Proposal:
        """Proposes restart prompts.

        Raises:
            ProposalError: If there is nothing to propose. The sampler then falls back.
        """


def proposal_of(proposer: Proposer, request: ProposalRequest) -> Proposal:
    """What a proposer proposes; no prompts if it raises, and ``failure`` of the details why."""
    started = time.perf_counter()
    failure = None
    try:
        proposal = proposer.propose(request)
        prompts = tuple(_checked(prompt, request) for prompt in proposal.prompts)
        proposal = Proposal(prompts, str(proposal.origin), dict(proposal.details))
    except ProposalError as error:
        details = error.details if isinstance(error.details, Mapping) else {}
        proposal, failure = Proposal((), "", details), str(error)
    except Exception as error:  # A study must outlive whatever a third-party proposer raises.
        _logger.debug("The proposer raised.", exc_info=True)
        details = {"proposer": type(proposer).__name__}
        proposal, failure = Proposal((), "", details), f"{type(error).__name__}: {error}"
    facts = {
        "failure": failure,
        "seconds": round(time.perf_counter() - started, 3),
        "history_seen": {
            "trial": request.trial_number,
            "n_finished": request.history.n_finished,
            "n_in_flight": len(request.history.in_flight),
        },
    }
    return replace(proposal, details={**records.jsonable(proposal.details), **facts})


def _checked(prompt: RestartPrompt, request: ProposalRequest) -> RestartPrompt:
    """The prompt in plain types, with the fixed tokens; a ValueError if of another space."""
    space = request.space
    plain = space.with_tokens(space.from_token_ids(prompt.token_ids), request.fixed)
    n_truncated, n_padding = int(prompt.n_truncated), int(prompt.n_padding)
    return replace(plain, n_truncated=n_truncated, n_padding=n_padding)
