"""The seam between the sampler and whoever thinks of restart prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from optuna_llm_catalyst.exceptions import CatalystError
from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.prompt_space import PromptSpace
from optuna_llm_catalyst.prompt_space import RestartPrompt


@dataclass(frozen=True)
class ProposalRequest:
    """What is requested of a proposer.

    Attributes:
        space: The space of the prompts.
        history: The study so far.
        n_candidates: How many prompts are wanted.
        seed: Non-negative 31-bit seed; the same request and seed give the same proposal, as far
            as the proposer can promise that.
        trial_number: The trial that will start from one of them.
        fixed: Token ids that are given, by position: an enqueued trial or Optuna's
            ``PartialFixedSampler`` fixed them. Every prompt of the proposal has them.
        screened: Whether the prompt with the best value before training is taken; else the
            first one is.
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
        details: What is known nevertheless (meta-prompt, raw reply, …), for the record.
    """

    def __init__(self, reason: str, details: Mapping[str, Any]) -> None:
        super().__init__(reason)
        self.details = details


class Proposer(Protocol):
    """Turns a study's history into candidates for the next restart.

    A proposer holds configuration only: it must survive pickling and copying, and remember
    nothing of earlier requests.
    """

    def propose(self, request: ProposalRequest) -> Proposal:
        """Proposes restart prompts.

        Raises:
            ProposalError: If there is nothing to propose. The sampler then falls back.
        """
        ...
