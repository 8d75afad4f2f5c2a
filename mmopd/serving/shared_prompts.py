"""vLLM side of scoring: a prompt is computed once for all its responses, and a reply has the rows of its response only.

vLLM does not read its prefix cache for a request that wants log-probs of its prompt, since the rows of cached tokens
would be missing. Scoring wants the rows of the response only, which follow the prompt. A request that has `PROMPT` in
its `extra_args` takes the whole blocks of its prompt from the cache, and computes each token of its response.

- The prompt's blocks come from the cache all together or not at all, and where they do not, they are computed first, in
  a pass of their own. So the bits of a score do not depend on which response came first.
- vLLM 0.32 returns uninitialised memory for the rows of cached tokens (V1 runner), or leaves them out (V2 runner). The
  rows of the prompt are cut off here.

A server without this plugin ignores the argument, and returns all rows. All changes are in the scheduler, which the
runners share. Run on CPUs with the V1 runner; [not run on GPU].
"""

import functools
from typing import Any

PROMPT = "mmopd_prompt"  # in `extra_args`: number of tokens before the response


class _Prompt:
    """A request for the look-up in the cache: its first tokens, of which at least the last one is to be computed."""

    def __init__(self, request: Any, tokens: int) -> None:
        self._request = request
        self.num_tokens = tokens
        self.skip_reading_prefix_cache = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def prompt_tokens(request: Any) -> int | None:
    """Return the number of tokens before the response of a request for scores; None for any other request."""
    params = request.sampling_params
    if params is None or params.prompt_logprobs is None:
        return None
    said = (params.extra_args or {}).get(PROMPT)
    return said if isinstance(said, int) and 0 < said <= request.num_prompt_tokens else None


def shared_tokens(scheduler: Any, request: Any) -> int:
    """Return the number of tokens that a request shares with the other responses to its prompt: whole blocks.

    The last token of the prompt is never among them, because it predicts the first of the response.
    """
    tokens = prompt_tokens(request)
    return 0 if tokens is None else (tokens - 1) // scheduler.block_size * scheduler.block_size


def install() -> None:
    """Change vLLM's scheduler in this process."""
    from vllm.v1.core.sched.scheduler import Scheduler

    plain_find, plain_limit = Scheduler._get_local_prefix_cache_hit, Scheduler._reserve_prefill_lookahead
    plain_update = Scheduler.update_from_output

    @functools.wraps(plain_find)
    def find(self: Any, request: Any) -> Any:
        shared = shared_tokens(self, request)
        if not shared:
            return plain_find(self, request)
        found = plain_find(self, _Prompt(request, shared + 1))  # type: ignore[arg-type]
        return found if found[1] == shared else (self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False)

    @functools.wraps(plain_limit)
    def limit(self: Any, request: Any, computed: int, new: int) -> int:
        shared = shared_tokens(self, request)
        return plain_limit(self, request, computed, shared - computed if computed < shared < computed + new else new)

    @functools.wraps(plain_update)
    def update(self: Any, scheduled: Any, output: Any) -> Any:
        rows = output.prompt_logprobs_dict or {}
        for name, tensors in rows.items():
            request = self.requests.get(name)
            if tensors is not None and request is not None and (tokens := prompt_tokens(request)) is not None:
                first = len(tensors.logprobs) - (request.num_prompt_tokens - tokens)
                rows[name] = tensors._replace(
                    logprob_token_ids=tensors.logprob_token_ids[first:],
                    logprobs=tensors.logprobs[first:],
                    selected_token_ranks=tensors.selected_token_ranks[first:],
                )
        return plain_update(self, scheduled, output)

    Scheduler._get_local_prefix_cache_hit = find  # type: ignore[method-assign]
    Scheduler._reserve_prefill_lookahead = limit  # type: ignore[method-assign, assignment]
    Scheduler.update_from_output = update  # type: ignore[method-assign, assignment]
