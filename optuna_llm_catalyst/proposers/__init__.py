"""History to restart prompts: one proposer a file, behind one method."""

from optuna_llm_catalyst.proposers.base import Proposal
from optuna_llm_catalyst.proposers.base import ProposalError
from optuna_llm_catalyst.proposers.base import ProposalRequest
from optuna_llm_catalyst.proposers.base import Proposer
from optuna_llm_catalyst.proposers.llm import LLMProposer
from optuna_llm_catalyst.proposers.mutation import MutationProposer


__all__ = [
    "LLMProposer",
    "MutationProposer",
    "Proposal",
    "ProposalError",
    "ProposalRequest",
    "Proposer",
]
