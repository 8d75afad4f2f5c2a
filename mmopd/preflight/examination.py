"""Examination of one replica of a teacher, one check after the other; `mmopd.preflight.run` examines all replicas.

After a timeout or a lost connection the replica is asked nothing more, so that the time is bounded.

One cause gives one failure: a server that counts image tokens differently gets no more requests with images, and if
scores do not repeat, their differences prove nothing.
"""

import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from time import monotonic

import aiohttp

from mmopd.modality import Encoder
from mmopd.preflight.check import Check, fail, ok
from mmopd.preflight.questions import Questions
from mmopd.preflight.replica_client import ReplicaClient, message_of
from mmopd.preflight.scores import apart, difference
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.wire import ReplyError

CHUNK = 1000  # number of vocabulary ids that one request compares
TOP_K = 20  # requested if the run needs none; vLLM's own limit, unless --max-logprobs is set
# An image must change a log-prob by this many times the noise of a repeat, and by at least `Questions.alive`.
ALIVE = 4.0
REFUSED = frozenset({401, 403})
AWAY = frozenset({"timeout", "connection"})
WAY_OUT = {
    "timeout": "see the server's log; if it is only slow, raise the teacher's `timeout`",
    "connection": "start the server, or correct its address in `endpoints`",
    "status": "see the server's log; it needs vLLM 0.32 or later, started with --enable-scale-out",
    "malformed": "a gateway changes the replies, or the server is older than vLLM 0.32: connect to the server directly",
    "ids": "the server or a gateway changes the ids of a request: connect directly to vLLM 0.32 or later",
    "non_finite": "the model returns NaN or infinity: check its weights and its `engine.dtype`",
}


class Vocabulary:
    """The student's ids in chunks, each with its text by the student's tokenizer, and the ids that a response may
    contain.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.tokenizer = encoder.tokenizer
        self.ids = sorted(encoder.tokenizer.get_vocab().values())
        self.chunks = [
            (chunk, self.decode(chunk)) for chunk in (self.ids[i : i + CHUNK] for i in range(0, len(self.ids), CHUNK))
        ]
        special = {i for i, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
        self.legal = sorted(set(self.ids) - special - set(encoder.banned))
        self.end = int(encoder.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids as vLLM's `/detokenize` does, with special tokens."""
        text: str = self.tokenizer.decode(list(ids))
        return text


class Examination:
    """The examination of one server; `checks` holds the results.

    Attributes:
        scores: index of a question -> log-probs of its response; empty unless they repeat and depend on the images.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        asked: Questions,
        http: aiohttp.ClientSession,
        vocabulary: Vocabulary,
        *,
        timeout: float,
        key: str,
        max_tokens: int,
        top_k: int,
    ) -> None:
        self.endpoint = endpoint
        self.tolerance = asked.tolerance
        self.checks: list[Check] = []
        self.scores: dict[int, tuple[float, ...]] = {}
        self._asked = asked
        self._client = ReplicaClient(endpoint, http, timeout)
        self._vocabulary = vocabulary
        self._key = key
        self._max_tokens = max_tokens
        self._top_k = top_k
        self._length: int | None = None  # max_model_len
        self._base: str | None = None  # the model under an adapter
        self._base_is_served = False
        self._images_agree = False
        self._noise = 0.0

    async def prove(self, done: Callable[[Endpoint], None]) -> None:
        """Run all checks and fill `checks`."""
        steps: list[tuple[str, Callable[[], Awaitable[Check | None]]]] = [
            ("reachable", self._reachable),
            ("vocabulary", self._same_vocabulary),
            ("scores", self._scores_text),
            ("image tokens", self._image_tokens),
            ("control tokens", self._control_tokens),
            ("context", self._context),
            ("top-k", self._top),
            ("same score twice", self._same_twice),
            ("image canary", self._canary),
        ]
        for name, step in steps:
            if not await self._take(name, step):
                break
        done(self.endpoint)

    async def prove_adapter(self) -> None:
        """Add the check that an adapter changes the scores of the model under it, if the server serves an adapter.

        No other request may be under way: in one batch with an adapter, vLLM 0.32 on CPU scores the base with it.
        """
        await self._take("adapter", self._adapter)

    async def _take(self, name: str, step: Callable[[], Awaitable[Check | None]]) -> bool:
        """Add the result of a check; return false if none can follow."""
        away = False
        try:
            found = await step()
        except ReplyError as fault:
            found = fail(str(fault), WAY_OUT[fault.cause])
            away = fault.cause in AWAY
        if found is not None:
            self.checks.append(replace(found, name=name, of=self.endpoint.name))
        return not away and (found is None or found.state != "fail" or name not in {"reachable", "scores"})

    async def _reachable(self) -> Check:
        """Check that the server answers, accepts the key, and lists its model."""
        begin = monotonic()
        status, reply = await self._client.send("GET", "/v1/models")
        seconds = monotonic() - begin
        if status in REFUSED:
            env = (
                f"the variable {self._key} holds no key that the server takes; it may have expired"
                if self._key
                else "the server wants a key"
            )
            return fail(
                f"{self.endpoint.url} refuses the key ({status})",
                env + ": `api_key_env` names the variable that holds it",
            )
        if status != 200:
            raise ReplyError("status", f"{status}: {message_of(reply)}")
        try:
            models = {card["id"]: card for card in json.loads(reply)["data"]}
        except (ValueError, LookupError, TypeError):
            raise ReplyError("malformed", f"no list of models: {reply[:80]!r}") from None
        if self.endpoint.model not in models:
            listed = ", ".join(map(repr, models)) or "no model"
            return fail(
                f"it serves {listed}, and not {self.endpoint.model!r}",
                "start it with --served-model-name, or correct the name of the model",
            )
        card = models[self.endpoint.model]
        self._base = card.get("parent")  # an adapter has the length of the model under it
        self._base_is_served = self._base in models
        card = models.get(self._base, card)
        self._length = card.get("max_model_len")
        return ok(f"{self.endpoint.url} serves {self.endpoint.model!r}", seconds=seconds)

    async def _same_vocabulary(self) -> Check:
        """Check that each of the student's ids has the same text on the server.

        Tokens that are a part of a character all have the same text when decoded alone.
        """
        ids = self._vocabulary.ids
        for chunk, text in self._vocabulary.chunks:
            found = await self._client.detokenize(chunk)
            if found is None:
                way_out = (
                    "let the gateway forward POST /detokenize; without it, ids that mean something else on the "
                    "server stay unnoticed"
                )
                return Check("", "warn", "not compared: the server has no /detokenize", way_out)
            if found != text:
                first = await self._first_that_differs(chunk)
                ours = self._vocabulary.decode([first])
                theirs = await self._client.detokenize([first])
                return fail(
                    f"id {first} is {ours!r} for the student and {theirs!r} for the server",
                    "scoring uses ids: choose a teacher of the student's model family, with the same tokenizer",
                    first=first,
                )
        return ok(f"{len(ids):,} ids are the student's", ids=len(ids))

    async def _first_that_differs(self, chunk: Sequence[int]) -> int:
        low = 0  # the first `low` ids agree, the first `high` do not
        high = len(chunk)
        while high - low > 1:
            middle = (low + high) // 2
            agree = await self._client.detokenize(chunk[:middle]) == self._vocabulary.decode(chunk[:middle])
            low, high = (middle, high) if agree else (low, middle)
        return chunk[low]

    async def _scores_text(self) -> Check:
        """Check that the server returns a log-prob for each token of a short answer to a short question."""
        begin = monotonic()
        scores = await self._client.score(self._asked.plain.encoded, self._asked.plain.tokens)
        seconds = monotonic() - begin
        alone = "" if self._client.shares_prompts else "; a prompt is computed anew for each response: no mmopd there"
        return ok(f"{len(scores)} tokens in {seconds:.2f} s{alone}", seconds=seconds, logprob=sum(scores))

    async def _image_tokens(self) -> Check | None:
        """Check that an item of each medium and awkward size becomes as many tokens on the server as here."""
        if not self._asked.sizes:
            return None
        fit = [
            one for one in self._asked.sizes if self._length is None or len(one.encoded.expanded) + 2 <= self._length
        ]
        left_out = "".join(
            f"; {one.name} ({one.size}) not asked: {one.tokens:,} tokens" for one in self._asked.sizes if one not in fit
        )
        for one in fit:
            got = await self._client.prompt_ids(one.encoded, (self._vocabulary.end,))
            expected = one.encoded.expanded
            if got != [*expected, self._vocabulary.end]:
                theirs = got.count(one.token)
                way_out = (
                    "give the server the student's image settings (preprocessor_config.json, --mm-processor-kwargs); "
                    "if every size differs, a gateway expands placeholders a second time"
                )
                found = f"{one.name} ({one.size}): {theirs:,} image tokens on the server, {one.tokens:,} here"
                if one.medium.io_settings:
                    reading = json.dumps({one.medium.slot: one.medium.io_settings})
                    way_out = f"start it with --media-io-kwargs '{reading}', and with the student's settings for "
                    way_out += one.medium.slot
                    found += f", {one.medium.differs}" * (theirs == one.tokens)
                return fail(found, way_out, server=theirs, here=one.tokens)
        self._images_agree = bool(fit)
        if not fit:
            return Check("", "warn", "no size was asked" + left_out, "raise `engine.max_model_len` (--max-model-len)")
        fewest, most = (pick(fit, key=lambda one: one.tokens) for pick in (min, max))
        span = f"{fewest.tokens:,} ({fewest.size}) to {most.tokens:,} ({most.size})"
        return ok(f"{len(fit)} sizes as counted here, {span}{left_out}", sizes=len(fit))

    async def _control_tokens(self) -> Check | None:
        """Check that a text that spells control tokens is the same text on the server, through each view."""
        asked = [
            one
            for one in self._asked.spelled
            if (self._images_agree or not one.prompt.is_visual)
            and (self._length is None or len(one.expanded) + 2 <= self._length)
        ]
        for one in asked:
            if await self._client.prompt_ids(one, (self._vocabulary.end,)) != [*one.expanded, self._vocabulary.end]:
                return fail("a text that spells control tokens becomes other ids on the server", WAY_OUT["ids"])
        return ok(f"{len(asked)} prompts that spell them keep their ids") if asked else None

    async def _context(self) -> Check | None:
        """Check that prompt, response and one spare token fit: a scoring request must generate one more token."""
        longest = self._asked.longest
        if longest is None:
            return None
        prompt = len(longest.expanded)
        less = self._max_tokens
        need = prompt + self._max_tokens + 1
        what = f"prompt {prompt:,} + response {self._max_tokens:,} + 1 spare = {need:,} tokens"
        what += f", {self._length:,} allowed" if self._length else ""
        numbers = {"needed": need, "prompt": prompt, "max_tokens": self._max_tokens} | (
            {"allowed": self._length} if self._length else {}
        )
        way_out = f"raise `engine.max_model_len` (--max-model-len) to {need:,}"
        if self._length is not None and self._length < need:
            less -= need - self._length
            return fail(
                f"{what}; {self._asked.looked}",
                way_out + f", or lower rollout.max_tokens to {less:,}" * (less > 0),
                **numbers,
            )
        tried = "not tried with its images, which fail"
        if self._images_agree or not longest.prompt.is_visual:
            tokens = random.Random(0).choices(self._vocabulary.legal, k=self._max_tokens)
            try:
                await self._client.score(longest, tokens)
            except ReplyError as fault:
                if fault.cause in AWAY:
                    raise
                return fail(
                    f"{what}, and refused: {fault}",
                    way_out + "; if it is short of memory, lower `engine.gpu_share`",
                    **numbers,
                )
            tried = "tried"
        return ok(f"{what}, {tried}; {self._asked.looked}", **numbers)

    async def _top(self) -> Check:
        """Check the number of log-probs that the server returns at a position."""
        k = self._top_k or TOP_K
        plain = self._asked.plain
        try:
            await self._client.score(plain.encoded, plain.tokens, k)
        except ReplyError as fault:
            if fault.cause in AWAY:
                raise
            if self._top_k:
                return fail(
                    f"{k} needed, refused ({fault})",
                    f"serve it with --max-logprobs {k} (`engine.extra_args`)",
                    needed=k,
                )
            return ok(f"{k} refused, none needed", needed=0)
        return ok(f"{k} given, {self._top_k or 'none'} needed", needed=self._top_k, given=k)

    async def _same_twice(self) -> Check:
        """Check that the same requests return the same log-probs again."""
        questions = {
            i: question
            for i, question in enumerate(self._asked.to_score)
            if self._images_agree or not question.encoded.prompt.is_visual
        }
        first, again = [
            {i: await self._client.score(question.encoded, question.tokens) for i, question in questions.items()}
            for _ in range(2)
        ]
        mean, self._noise = apart(first, again)
        found = f"{len(questions)} responses: {difference(mean, self._noise)}"
        numbers = {"mean": mean, "largest": self._noise, "tolerance": self.tolerance}
        if mean > self.tolerance:
            way_out = (
                "one address must be one server: list each replica of a load balancer in `endpoints`; otherwise "
                "check the server's hardware"
            )
            return fail(f"{found}, {self.tolerance:g} allowed", way_out, **numbers)
        self.scores = first
        return ok(found, **numbers)

    async def _canary(self) -> Check | None:
        """Check that the score of the response changes without the real image; the largest change over the prompts
        counts.
        """
        seeing = [i for i in self.scores if self._asked.to_score[i].others]
        if not seeing:
            return None
        change = dict.fromkeys(self._asked.to_score[seeing[0]].others, 0.0)
        for i in seeing:
            question = self._asked.to_score[i]
            for name, other in question.others.items():
                scores = await self._client.score(other, question.tokens)
                change[name] = max(change[name], apart({0: scores}, {0: self.scores[i]})[1])
        needed = max(self._asked.alive, ALIVE * self._noise)
        found = (
            f"a blank image moves a log-prob by {change['blank']:.2g}, a shuffled one by {change['shuffled']:.2g}; "
            f"{needed:.2g} needed"
        )
        found += f", over {len(seeing)} responses"
        numbers = change | {"needed": needed, "noise": self._noise}
        if min(change.values()) > needed:
            return ok(found, **numbers)
        self.scores = {}  # scores that are known to be wrong are not compared
        if change["blank"] <= needed:
            way_out = (
                "the server ignores the image: let no gateway drop `content_parts`, and serve the model with its "
                "vision part; if it is meant to be blind, give it the view `text`"
            )
        else:
            way_out = (
                "the server sees that there is an image, but not its content: compare its image settings with the "
                "student's"
            )
        return fail(found, way_out, **numbers)

    async def _adapter(self) -> Check | None:
        """Check that some score differs from that of the model under the adapter, by more than the noise."""
        if self._base is None or not self.scores:
            return None
        if not self._base_is_served:
            found = f"not compared: the server does not list {self._base!r}, the model under it"
            return Check("", "warn", found, "let it be listed; else an adapter that changes nothing stays unnoticed")
        base = self._client.named(self._base)
        needed = ALIVE * self._noise
        change = 0.0
        for i, scores in self.scores.items():
            question = self._asked.to_score[i]
            without = await base.score(question.encoded, question.tokens)
            change = max(change, apart({0: scores}, {0: without})[1])
            if change > needed:
                return ok(f"moves a log-prob of {self._base!r} by {change:.2g}", change=change, needed=needed)
        return fail(
            f"{len(self.scores)} responses have the scores of {self._base!r} without it: the largest change is "
            f"{change:.2g}, and more than {needed:.2g} is needed",
            "the server applies nothing of the adapter: compare its names with the model's "
            "(docs/teachers.md#an-adapter-with-other-names), or use the model without it",
            change=change,
            needed=needed,
        )
