"""``meta-prompt``: what the LLM would be told next, from the study alone."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace

from optuna_llm_catalyst import history
from optuna_llm_catalyst import PromptSpace
from optuna_llm_catalyst import records
from optuna_llm_catalyst.cli import output
from optuna_llm_catalyst.cli.options import MetaPromptCommand
from optuna_llm_catalyst.cli.options import sections_of
from optuna_llm_catalyst.cli.studies import load_study
from optuna_llm_catalyst.prompt_tuning.pretrained import load_tokenizer
from optuna_llm_catalyst.proposers import meta_prompt
from optuna_llm_catalyst.proposers import ProposalRequest
from optuna_llm_catalyst.proposers.sections import MetaPromptOptions
from optuna_llm_catalyst.schema import decode
from optuna_llm_catalyst.schema import SchemaError


#: The user attribute of a study that holds a :class:`MetaPromptSetup`.
SETUP = "llm_catalyst:meta_prompt"


@dataclass(frozen=True)
class MetaPromptSetup:
    """What the last ``tune`` told beside the trials; ``max_tokens`` is None for no limit."""

    model: str
    num_virtual_tokens: int
    n_candidates: int
    top_k: int
    max_tokens: int | None
    options: MetaPromptOptions
    screened: bool = True


def run(options: MetaPromptCommand) -> None:
    """Prints the meta-prompt to stdout and its length to stderr, or both as JSON."""
    study = load_study(options.storage, options.study_name)
    try:
        setup = decode(MetaPromptSetup, study.user_attrs.get(SETUP))
    except SchemaError as error:
        raise output.UserError(
            f"study {study.study_name!r} does not say what its LLM is told: run this version of "
            "`tune` on it, if only with --stages 0."
        ) from error
    space = PromptSpace(load_tokenizer(setup.model), setup.num_virtual_tokens)
    request = ProposalRequest(
        space,
        history.from_study(study, space, top_k=setup.top_k),
        setup.n_candidates,
        seed=0,
        trial_number=len(records.all_trials(study)),
        screened=setup.screened,
    )
    told = replace(
        setup.options,
        sections=sections_of(options.sections) or setup.options.sections,
        # This command describes the next stage, so count it.
        n_stages=max(setup.options.n_stages or 0, request.history.n_finished + 1),
    )
    built = meta_prompt.build(request, told, max_tokens=setup.max_tokens)
    output.report({"meta_prompt": built.text, **built.facts()}, [built.text], as_json=options.json)
    if not options.json:
        length, most = built.estimated_prompt_tokens, built.max_prompt_tokens
        limit = "no limit" if most is None else f"of {most} that fit"
        output.say(
            f"{len(built.text)} characters, at most about {length} tokens ({limit}); "
            f"{built.n_points} prompts shown, {built.n_dropped_points} left out; sections: "
            f"{', '.join(built.sections)}"
        )
