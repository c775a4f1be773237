"""Directional facts: which way past stages moved the loss. Computed, never guessed.

LLM optimisers do better when feedback says which way to move and not only how good a point was
(arXiv 2405.16434). Pure functions of the finished stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
import math
from statistics import mean

from optuna_llm_catalyst.history import History
from optuna_llm_catalyst.history import Outcome
from optuna_llm_catalyst.prompt_space import PromptSpace


#: Pairs of stages are compared among so many of the last ones.
_MAX_OUTCOMES = 60
_MAX_REPLACEMENTS = 4
_MAX_WORDS = 4
#: A group of fewer stages says nothing on average.
_MIN_GROUP = 2


def facts(history: History, space: PromptSpace) -> list[str]:
    """What the finished stages say about where to go, as sentences; empty if they say nothing."""
    finite = [outcome for outcome in history.outcomes if math.isfinite(outcome.value)]
    outcomes = finite[-_MAX_OUTCOMES:]
    name = "loss" if history.minimize else "value"
    return [
        *replacements(outcomes, space, name),
        *words(outcomes, space, name),
        *length(outcomes, space, name),
        *standstill(history),
    ]


def replacements(outcomes: Sequence[Outcome], space: PromptSpace, name: str) -> list[str]:
    """What changed with a single token, for stages that differ in no other; greatest first.

    Several pairs of stages for the same two words are averaged.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for old, new in combinations(outcomes, 2):
        places = [i for i in range(len(old.token_ids)) if old.token_ids[i] != new.token_ids[i]]
        if len(places) != 1:
            continue
        before, after = (space.whole_words.get(o.token_ids[places[0]]) for o in (old, new))
        if before and after:
            # The same two words the other way round count with the other sign.
            sign = -1 if (after, before) in found else 1
            pair = (after, before) if sign == -1 else (before, after)
            found.setdefault(pair, []).append(sign * (new.value - old.value))
    averages = [(pair, mean(changes)) for pair, changes in found.items()]
    ranked = sorted(averages, key=lambda item: -abs(item[1]))[:_MAX_REPLACEMENTS]
    return [
        f'replacing "{old}" by "{new}" changed the {name} by {change:+.3f}'
        for (old, new), change in ranked
    ]


def words(outcomes: Sequence[Outcome], space: PromptSpace, name: str) -> list[str]:
    """Words whose prompts ended better or worse on average than those without them."""
    tokens = {token_id for outcome in outcomes for token_id in outcome.token_ids}
    found = []
    for token_id in sorted(tokens & space.whole_words.keys()):
        having = [o.value for o in outcomes if token_id in o.token_ids]
        lacking = [o.value for o in outcomes if token_id not in o.token_ids]
        if min(len(having), len(lacking)) >= _MIN_GROUP:
            found.append((mean(having) - mean(lacking), token_id, len(having), len(lacking)))
    ranked = sorted(found, key=lambda row: (-abs(row[0]), row[1]))[:_MAX_WORDS]
    return [
        f'prompts with "{space.whole_words[token_id]}": {name} {change:+.3f} on average against '
        f"those without it ({n_having} with, {n_lacking} without)"
        for change, token_id, n_having, n_lacking in ranked
    ]


def length(outcomes: Sequence[Outcome], space: PromptSpace, name: str) -> list[str]:
    """Whether prompts that fill more of the virtual tokens ended better or worse."""
    sizes = [space.n_used(outcome.token_ids) for outcome in outcomes]
    if not sizes:
        return []
    middle = (min(sizes) + max(sizes)) / 2
    short = [o.value for o, size in zip(outcomes, sizes, strict=True) if size <= middle]
    long = [o.value for o, size in zip(outcomes, sizes, strict=True) if size > middle]
    if min(len(short), len(long)) < _MIN_GROUP:
        return []
    return [
        f"prompts of over {middle:g} tokens ended at a {name} of {mean(long):.3f} on average, "
        f"shorter ones at {mean(short):.3f} ({len(long)} and {len(short)} prompts)"
    ]


def standstill(history: History) -> list[str]:
    """How many of the last restarts did not beat the best."""
    if len(history.outcomes) < _MIN_GROUP:
        return []
    sign = 1 if history.minimize else -1
    values = [sign * outcome.value for outcome in history.outcomes]
    since = len(values) - 1 - values.index(min(values))
    if since == 0:
        return ["the last restart is the best so far"]
    restarts = "restart" if since == 1 else f"{since} restarts"
    return [f"the last {restarts} did not beat the best"]
