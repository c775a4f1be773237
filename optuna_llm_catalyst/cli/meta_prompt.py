"""``meta-prompt``: what the LLM would be asked next, from the study alone."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
import sys

import optuna

from optuna_llm_catalyst import history
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import report
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.studies import load_study
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions


_SETUP = "llm_catalyst:meta_prompt"


@dataclass(frozen=True)
class MetaPromptSetup:
    """What is needed beside the trials to ask as ``tune`` does.

    Attributes:
        model: The frozen model, whose tokenizer counts.
        num_virtual_tokens: Length of the prompts.
        n_candidates: How many prompts are asked for.
        top_k: How many of the history are shown.
        max_tokens: How long the meta-prompt may be; None for no limit.
        options: What else it tells.
    """

    model: str
    num_virtual_tokens: int
    n_candidates: int
    top_k: int
    max_tokens: int | None
    options: MetaPromptOptions


def save_meta_prompt_setup(study: optuna.Study, setup: MetaPromptSetup) -> None:
    """Keeps it on the study; written by the process that opens it, never inside a trial."""
    study.set_user_attr(_SETUP, asdict(setup))


def load_meta_prompt_setup(study: optuna.Study) -> MetaPromptSetup:
    """What the last ``tune`` asks with.

    Raises:
        UserError: If the study is none of ``tune``.
    """
    try:
        saved = dict(study.user_attrs[_SETUP])
        return MetaPromptSetup(options=MetaPromptOptions(**saved.pop("options")), **saved)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"study {study.study_name!r} does not say how it asks: it was not made by this "
            "version of tune."
        ) from error


def print_meta_prompt(
    storage: str, study_name: str, sections: tuple[str, ...], *, as_json: bool
) -> None:
    """Prints the meta-prompt to stdout and its length to stderr, or both as JSON."""
    study = load_study(storage, study_name)
    setup = load_meta_prompt_setup(study)
    if sections:
        try:
            check_sections(sections)
        except ValueError as error:
            raise UserError(str(error)) from error
        setup = replace(setup, options=replace(setup.options, sections=sections))
    try:
        built = meta_prompt.build(
            _request(study, setup), setup.options, max_tokens=setup.max_tokens
        )
    except ProposalError as error:
        raise UserError(str(error)) from error
    if as_json:
        report.print_json({"meta_prompt": built.text, **built.facts()})
        return
    print(report.printable(built.text))
    length, most = built.estimated_prompt_tokens, built.max_prompt_tokens
    limit = "no limit" if most is None else f"of {most} that fit"
    print(
        f"{len(built.text)} characters, at most about {length} tokens ({limit}); "
        f"{built.n_points} prompts shown, {built.n_dropped_points} left out; sections: "
        f"{', '.join(built.sections)}",
        file=sys.stderr,
    )


def _request(study: optuna.Study, setup: MetaPromptSetup) -> ProposalRequest:
    from optuna_llm_catalyst.prompt_tuning.pretrained import load_tokenizer

    space = PromptSpace(load_tokenizer(setup.model), setup.num_virtual_tokens)
    number = len(records.all_trials(study))
    past = history.from_study(study, space, top_k=setup.top_k)
    return ProposalRequest(space, past, setup.n_candidates, seed=0, trial_number=number)
