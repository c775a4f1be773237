"""The tables of the docs name what is there in the code, with its defaults."""

from __future__ import annotations

import ast
from dataclasses import fields
from dataclasses import MISSING
import inspect
import re
from typing import Any

import pytest

import optuna_llm_catalyst as package
from optuna_llm_catalyst import prompt_tuning
from optuna_llm_catalyst.cli.tune_options import TuneOptions
from optuna_llm_catalyst.prompt_tuning.objective import TEXT_STAGE
from optuna_llm_catalyst.proposers.sections import DEFAULT_SECTIONS
from optuna_llm_catalyst.proposers.sections import SECTIONS

from .markdown_tables import DOCS
from .markdown_tables import Table
from .markdown_tables import table
from .markdown_tables import tables


PARAMETERS = {table.name.strip("`"): table for table in tables("parameters.md")}
OPTIONS = [table for table in tables("options.md") if table.name == "option"]
#: What users make. A class without a table here would be a gap in the page.
DESCRIBED = {
    "PromptSpace",
    "LLMCatalystSampler",
    "LLMProposer",
    "OllamaProvider",
    "OpenAICompatibleProvider",
    "TransformersProvider",
    "ReplayProvider",
    "PromptTuningObjective",
    "BlackBoxModel",
    "BlackBoxStage",
    "CLIPClassifier",
    "ContrastiveStage",
    "DistilledStage",
    "GradientStage",
    "LowRankPrompt",
    "ZerothOrderStage",
    "CausalLMClassifier",
    "DualEncoderClassifier",
    "MaskedLMClassifier",
    "SequenceClassifier",
}


def literal(cell: str) -> Any:
    """The value that a cell writes down; MISSING if it is words."""
    code = re.fullmatch(r"`([^`]*)`|([-\d.e]+)", cell)
    try:
        return ast.literal_eval(code[1] or code[2]) if code else MISSING
    except (SyntaxError, ValueError):
        return MISSING


def defaults(described: Table) -> dict[str, str]:
    return {name: row[1] for row in described.rows for name in re.findall("`([^`]+)`", row[0])}


def test_the_page_describes_what_users_make() -> None:
    assert PARAMETERS.keys() == DESCRIBED


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_a_table_has_the_arguments_in_their_order(name: str) -> None:
    made = getattr(package, name, None) or getattr(prompt_tuning, name)
    assert PARAMETERS[name].names == list(inspect.signature(made).parameters)


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_a_table_has_the_defaults(name: str) -> None:
    made = getattr(package, name, None) or getattr(prompt_tuning, name)
    said = defaults(PARAMETERS[name])
    for parameter in inspect.signature(made).parameters.values():
        cell = said[parameter.name]
        assert (cell == "") == (parameter.default is parameter.empty), parameter.name
        if literal(cell) is not MISSING:
            assert literal(cell) == parameter.default, parameter.name


@pytest.mark.parametrize("described", OPTIONS, ids=lambda described: described.names[0])
def test_options_are_those_of_tune_with_their_defaults(described: Table) -> None:
    known = {field.name: field.default for field in fields(TuneOptions)}
    assert described.rows
    for option, cell in defaults(described).items():
        default = known[option.removeprefix("--").replace("-", "_")]
        if literal(cell) is not MISSING:
            assert literal(cell) == default, option
        elif re.fullmatch("`[^`]+`", cell):
            assert cell.strip("`") == default, option


def test_the_stage_of_a_text_prompt_is_the_one_described() -> None:
    rows = {row[0].strip("`"): row for row in PARAMETERS["PromptTuningObjective"].rows}
    (code,) = re.findall(r"`(GradientStage\(.+\))`", rows["text_stage"][2])
    assert eval(code, {"GradientStage": prompt_tuning.GradientStage}) == TEXT_STAGE


def test_the_sections_are_those_of_the_meta_prompt() -> None:
    described = table("llm.md", "section")
    assert sorted(described.names) == sorted(SECTIONS)
    default = {
        name
        for row in described.rows
        for name in re.findall("`([^`]+)`", row[0])
        if row[2] != "no"
    }
    assert default == set(DEFAULT_SECTIONS)


def test_the_index_names_every_page() -> None:
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    linked = re.findall(r"\]\(([^)]+)\)", (DOCS / "README.md").read_text(encoding="utf-8"))
    assert pages <= set(linked)
    for link in linked:
        assert (DOCS / link).exists(), link
