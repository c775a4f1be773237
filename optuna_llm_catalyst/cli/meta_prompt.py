"""``meta-prompt``: what the LLM would be told next, from the study alone."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace

import optuna

from optuna_llm_catalyst import history
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.errors import user_input
from optuna_llm_catalyst.cli.errors import UserError
from optuna_llm_catalyst.cli.options import MetaPromptCommand
from optuna_llm_catalyst.cli.options import names
from optuna_llm_catalyst.cli.studies import load_study
from optuna_llm_catalyst.prompt_tuning.pretrained import load_tokenizer
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import ProposalError
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers.sections import check_sections
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import SchemaError


_SETUP = "llm_catalyst:meta_prompt"


@dataclass(frozen=True)
class MetaPromptSetup:
    """What is needed beside the trials to make the meta-prompt of ``tune``.

    Attributes:
        model: The frozen model, whose tokenizer counts.
        num_virtual_tokens: Length of the prompts.
        n_candidates: How many prompts are requested.
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


def run(options: MetaPromptCommand) -> int:
    """Prints the meta-prompt to stdout and its length to stderr, or both as JSON."""
    study = load_study(options.storage, options.study_name)
    setup = _load_setup(study)
    sections = names(options.sections)
    with user_input():
        check_sections(sections)
    if sections:
        setup = replace(setup, options=replace(setup.options, sections=sections))
    request = _request(study, setup)
    # There is a next stage, of which this command speaks.
    n_stages = max(setup.options.n_stages or 0, request.history.n_finished + 1)
    told = replace(setup.options, n_stages=n_stages)
    try:
        built = meta_prompt.build(request, told, max_tokens=setup.max_tokens)
    except ProposalError as error:
        raise UserError(str(error)) from error
    if options.json:
        output.print_json({"meta_prompt": built.text, **built.facts()})
        return 0
    output.tell(built.text)
    limit = (
        "no limit" if built.max_prompt_tokens is None else f"of {built.max_prompt_tokens} that fit"
    )
    output.say(
        f"{len(built.text)} characters, at most about {built.estimated_prompt_tokens} tokens ({limit}); "
        f"{built.n_points} prompts shown, {built.n_dropped_points} left out; sections: "
        f"{', '.join(built.sections)}"
    )
    return 0


def _load_setup(study: optuna.Study) -> MetaPromptSetup:
    """What the last ``tune`` told beside the trials."""
    try:
        return decode(MetaPromptSetup, study.user_attrs.get(_SETUP))
    except SchemaError as error:
        raise UserError(
            f"study {study.study_name!r} does not say what its LLM is told: run this version of "
            "`tune` on it, if only with --stages 0."
        ) from error


def _request(study: optuna.Study, setup: MetaPromptSetup) -> ProposalRequest:
    space = PromptSpace(load_tokenizer(setup.model), setup.num_virtual_tokens)
    number = len(records.all_trials(study))
    past = history.from_study(study, space, top_k=setup.top_k)
    return ProposalRequest(
        space, past, setup.n_candidates, seed=0, trial_number=number, screened=True
    )
