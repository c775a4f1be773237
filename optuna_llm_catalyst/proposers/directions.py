"""Directional facts: which way past stages moved the loss. Computed, never guessed.

LLM optimisers do better when feedback says which way to move, not only how good a point was
(arXiv 2405.16434).
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
_MAX_FACTS = 4
#: A group of fewer stages says nothing on average.
_MIN_GROUP = 2


def facts(history: History, space: PromptSpace) -> list[str]:
    """What the finished stages say about where to go, as sentences; empty if they say nothing."""
    finite = [outcome for outcome in history.outcomes if math.isfinite(outcome.value)]
    outcomes, name = finite[-_MAX_OUTCOMES:], value_name(history)
    return [
        *replacements(outcomes, space, name),
        *words(outcomes, space, name),
        *length(outcomes, space, name),
        *standstill(history),
    ]


def value_name(history: History) -> str:
    """What the LLM is told that a study's value is."""
    return "loss" if history.minimize else "value"


def replacements(outcomes: Sequence[Outcome], space: PromptSpace, name: str) -> list[str]:
    """What changed on average with a single token, for stages that differ in no other."""
    found: dict[tuple[str, str], list[float]] = {}
    for old, new in combinations(outcomes, 2):
        places = [i for i in range(len(old.token_ids)) if old.token_ids[i] != new.token_ids[i]]
        if len(places) != 1:
            continue
        before, after = (space.whole_words.get(o.token_ids[places[0]]) for o in (old, new))
        if before and after:
            # The same two words the other way round count with the other sign.
            if (after, before) in found:
                found[after, before].append(old.value - new.value)
            else:
                found.setdefault((before, after), []).append(new.value - old.value)
    averages = [(mean(changes), *pair) for pair, changes in found.items()]
    ranked = sorted(averages, key=lambda row: -abs(row[0]))[:_MAX_FACTS]
    return [
        f'replacing "{old_word}" by "{new_word}" changed the {name} by {change:+.3f}'
        for change, old_word, new_word in ranked
    ]


def words(outcomes: Sequence[Outcome], space: PromptSpace, name: str) -> list[str]:
    """Words whose prompts ended better or worse on average than those without them."""
    tokens = {token_id for outcome in outcomes for token_id in outcome.token_ids}
    found = []
    for token_id in sorted(tokens & space.whole_words.keys()):
        having = [o.value for o in outcomes if token_id in o.token_ids]
        lacking = [o.value for o in outcomes if token_id not in o.token_ids]
        if min(len(having), len(lacking)) >= _MIN_GROUP:
            change = mean(having) - mean(lacking)
            found.append((change, space.whole_words[token_id], len(having), len(lacking)))
    ranked = sorted(found, key=lambda row: -abs(row[0]))[:_MAX_FACTS]
    return [
        f'prompts with "{word}": {name} {change:+.3f} on average against those without it '
        f"({n_having} with, {n_lacking} without)"
        for change, word, n_having, n_lacking in ranked
    ]


def length(outcomes: Sequence[Outcome], space: PromptSpace, name: str) -> list[str]:
    """Whether prompts that fill more of the virtual tokens ended better or worse."""
    sizes = [space.n_used(outcome.token_ids) for outcome in outcomes]
    middle = (min(sizes, default=0) + max(sizes, default=0)) / 2
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
    values = [outcome.value for outcome in history.outcomes]
    best = min(values) if history.minimize else max(values)
    since = len(values) - 1 - values.index(best)
    if since == 0:
        return ["the last restart is the best so far"]
    restarts = "restart" if since == 1 else f"{since} restarts"
    return [f"the last {restarts} did not beat the best"]
