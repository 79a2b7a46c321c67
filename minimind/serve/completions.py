"""``POST /v1/completions``：续写，提示可以是文字或词元，可以几条一起。"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from minimind.inference.engine import Request
from minimind.inference.generate import TextStream
from minimind.serve.errors import ApiError
from minimind.serve.generation import Job, Settings, check_ids, fit, new_id, progress_of, submit, usage_of
from minimind.serve.hooks import Constrained, FormHook, make_hook
from minimind.serve.metrics import Metrics
from minimind.serve.models import ServedModel
from minimind.serve.samples import TextSample
from minimind.serve.schemas import CompletionRequest
from minimind.serve.stops import StopMatcher
from minimind.serve.tickets import Increment, Ticket, TokenOut
from minimind.tokenizer import document_start, encode_plain

MAX_PROMPTS = 64


class TextAnswer:
    """一次续写请求。

    文字的提示按纯文本编码，前面加上模型训练时用的开头记号；词元的提示原样使用。
    """

    def __init__(self, model: ServedModel, request: CompletionRequest):
        self.model, self.request = model, request
        self.id, self.created = new_id("cmpl"), int(time.time())
        check_ids(request.logit_bias or (), model, "logit_bias")
        check_ids(request.stop_token_ids or (), model, "stop_token_ids")
        try:
            given = request.prompts()
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None
        if len(given) > MAX_PROMPTS:
            raise ApiError(400, f"一次至多 {MAX_PROMPTS} 条提示，给了 {len(given)} 条", param="prompt")
        self.texts = [value if isinstance(value, str) else None for value in given]
        prompts = [self._encode(value) for value in given]
        self.only_score = request.max_tokens == 0
        asked = 16 if request.max_tokens is None else 1 if self.only_score else request.limit
        top, form = request.logprobs, None
        score = top if request.echo else None
        if constraint := request.constraint:
            text, stops = model.grammar.constrained(constraint), sorted(model.eos_ids)
            form = lambda: FormHook([Constrained(text, stops)])  # noqa: E731
        self.jobs = [
            Job(
                model,
                Request(
                    prompt,
                    request.params(),
                    fit(prompt, asked, model, "prompt"),
                    n=1 if self.only_score else request.samples,
                    hook=make_hook(request, model.eos_ids, form),
                    top_logprobs=top,
                    score=score,
                    processed=request.logprobs_mode == "processed_logprobs",
                ),
            )
            for prompt in prompts
        ]

    def _encode(self, value: str | list[int]) -> list[int]:
        if isinstance(value, str):
            return [*document_start(self.model.tokenizer), *encode_plain(self.model.tokenizer, value)]
        check_ids(value, self.model)
        return value

    def submit(self, settings: Settings) -> list[Ticket]:
        """排进引擎；后面的排不进时，前面的也取消。只要提示的文字时不必排。"""
        tickets: list[Ticket] = []
        if self.only_score and self.jobs[0].request.score is None:
            return tickets
        runner, total = self.model.runner, sum(job.request.n for job in self.jobs)
        if total > (most := runner.max_slots + runner.max_queue):
            raise ApiError(
                400, f"{len(self.jobs)} 条提示共要 {total} 个样本，服务器至多 {most} 个", param="prompt"
            )
        try:
            for job in self.jobs:
                tickets.append(submit(job, settings))
        except ApiError:
            for ticket in tickets:
                self.model.runner.cancel(ticket)
            raise
        return tickets

    def _sample(self, index: int) -> TextSample:
        request = self.request
        stops = StopMatcher(request.stops, request.include_stop_str_in_output)
        stop_ids = set() if request.include_stop_str_in_output else set(request.stop_token_ids or ())
        return TextSample(
            index,
            TextStream(self.model.tokenizer),
            stops,
            self.model.eos_ids,
            stop_ids=stop_ids,
            least=request.min_tokens or 0,
        )

    def _samples(self, which: int) -> list[TextSample]:
        """第 ``which`` 条提示的各个样本。"""
        n = self.request.samples
        return [self._sample(index) for index in range(which * n, which * n + n)]

    def _echo(self, which: int, ticket: Ticket | None) -> tuple[str, list[TokenOut]]:
        """``echo`` 时提示的文字与（要的话）逐词元的对数概率；自己加的开头记号不算。"""
        if not self.request.echo:
            return "", []
        job, text = self.jobs[which], self.texts[which]
        skip = 0 if text is None else len(document_start(self.model.tokenizer))
        if text is None:
            text = self.model.tokenizer.decode(job.request.prompt_ids, skip_special_tokens=False)
        return text, ticket.scored[skip:] if ticket is not None else []

    def _take(
        self, progress: Increment, samples: list[TextSample], ticket: Ticket
    ) -> tuple[TextSample, str] | None:
        """一个进展 → （样本，新的文字）；写完时文字可以是空的，没有可给的是 ``None``。"""
        sample = samples[progress.index]
        if sample.finish_reason is not None:
            return None
        text = sample.push(progress)
        if sample.finish_reason is not None and not progress.finished:
            self.model.runner.cancel(ticket, progress.index)
        return (sample, text) if text or sample.finish_reason is not None else None

    def _choice(self, sample: TextSample, text: str, prompt: list[TokenOut] = (), reason: str | None = None):
        choice = {"index": sample.index, "text": text, "logprobs": None, "finish_reason": reason}
        if self.request.logprobs is not None:
            choice["logprobs"] = sample.take_logprobs(self.model.vocabulary, prompt)
        if self.request.return_token_ids:
            choice["token_ids"] = sample.take_ids()
            choice["prompt_token_ids"] = self.jobs[sample.index // self.request.samples].request.prompt_ids
        return choice

    def _echoes(self, which: int, samples: list[TextSample], ticket: Ticket | None) -> list[dict[str, Any]]:
        """流式时各样本开头的一段：提示与它的分数。"""
        prefix, scored = self._echo(which, ticket)
        reason = "length" if self.only_score else None
        return [self._choice(sample, prefix, scored, reason) for sample in samples]

    async def whole(self, tickets: list[Ticket], settings: Settings, metrics: Metrics) -> dict[str, Any]:
        """一次给出的答案。"""
        samples = [self._samples(which) for which in range(len(self.jobs))]
        texts: dict[int, str] = {}
        try:
            for which, ticket in enumerate(tickets):
                async for progress in progress_of(self.jobs[which], ticket, settings, metrics):
                    if self.only_score:  # 引擎总要写一个，不要它
                        continue
                    if piece := self._take(progress, samples[which], ticket):
                        sample, text = piece
                        texts[sample.index] = texts.get(sample.index, "") + text
        finally:  # 前面的半途而废时，后面的也不要了；写完的取消是空操作
            for ticket in tickets:
                self.model.runner.cancel(ticket)
        choices = []
        for which, own in enumerate(samples):
            prefix, scored = self._echo(which, tickets[which] if tickets else None)
            for sample in own:
                reason = "length" if self.only_score else sample.finish_reason
                choices.append(self._choice(sample, prefix + texts.get(sample.index, ""), scored, reason))
        usage = usage_of(self.jobs, sum(sample.written for own in samples for sample in own))
        return self._envelope(choices) | {"usage": usage}

    async def stream(self, tickets: list[Ticket], settings: Settings, metrics: Metrics) -> AsyncIterator[str]:
        """流式的各行；几条提示依次给出。"""

        def line(choices: list[dict[str, Any]], **extra: Any) -> str:
            return f"data: {json.dumps(self._envelope(choices) | extra, ensure_ascii=False)}\n\n"

        written = 0
        try:
            for which in range(len(self.jobs)):
                samples, ticket = self._samples(which), tickets[which] if tickets else None
                told = not (self.request.echo or self.only_score)
                if ticket is None:
                    for choice in self._echoes(which, samples, ticket):
                        yield line([choice])
                    continue
                async for progress in progress_of(self.jobs[which], ticket, settings, metrics):
                    for choice in () if told else self._echoes(which, samples, ticket):  # 提示的分数先到
                        yield line([choice])
                    told = True
                    if self.only_score:
                        continue
                    if piece := self._take(progress, samples, ticket):
                        sample, text = piece
                        yield line([self._choice(sample, text, reason=sample.finish_reason)])
                        written += sample.written if sample.finish_reason is not None else 0
            if self.request.include_usage:
                yield line([], usage=usage_of(self.jobs, written))
        except ApiError as error:
            yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n"
        finally:
            for ticket in tickets:
                self.model.runner.cancel(ticket)
        yield "data: [DONE]\n\n"

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.id,
            "choices": choices,
        }
