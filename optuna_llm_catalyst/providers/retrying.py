"""Transport retries: the same request again, when the way to the LLM failed and not its reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import random
import time

import tenacity

from optuna_llm_catalyst.exceptions import ProviderError
from optuna_llm_catalyst.providers.base import Completion
from optuna_llm_catalyst.providers.base import CompletionRequest
from optuna_llm_catalyst.providers.base import Provider


def complete(
    provider: Provider, request: CompletionRequest, *, max_tries: int, backoff: float
) -> tuple[Completion, int]:
    """Makes a request until there is a completion, an error that stays, or no time left.

    The request's ``timeout`` is for all tries and pauses together; the first pause has ``backoff``
    seconds. Returns the completion and the number of tries, or raises the last ``ProviderError``.
    """
    deadline = time.monotonic() + request.timeout
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: getattr(error, "transient", False)),
        stop=tenacity.stop_after_attempt(max_tries) | tenacity.stop_before_delay(request.timeout),
        wait=_backoff(backoff, request.seed),
        reraise=True,
    )

    def once() -> Completion:
        left = max(deadline - time.monotonic(), 0.0)
        return provider.complete(replace(request, timeout=left))

    try:
        return retrying(once), retrying.statistics["attempt_number"]
    except ProviderError as error:
        n_tries = retrying.statistics["attempt_number"]
        if n_tries == 1:
            raise
        raise ProviderError(f"{error} (tried {n_tries} times)") from error


def _backoff(first: float, seed: int) -> Callable[[tenacity.RetryCallState], float]:
    """Pauses that double, with jitter: workers that failed together do not come back together.

    Its generator is its own: a training loop's random numbers do not depend on a server.
    """
    rng = random.Random(seed)
    return lambda state: float(first * 2 ** (state.attempt_number - 1) * rng.uniform(0.5, 1.0))
