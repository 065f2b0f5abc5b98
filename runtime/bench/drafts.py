"""The draft budget's rule against fixed sizes: steps, tokens verified, and what that costs a machine bound by memory.

The same prompts are answered greedily under each rule, with more and more requests in flight. Times depend on the
machine; the other figures do not: a step of T tokens (prompts left out) costs max(1, T / B) passes over the weights on
a machine whose steps are bound by memory up to B tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

from apar.runtime.answer import Answer
from apar.runtime.bench.machine import describe_machine
from apar.runtime.bench.timed_executor import TimedExecutor
from apar.runtime.device_logits import DeviceLogits
from apar.runtime.engine import Engine
from apar.runtime.executor.base import Executor
from apar.runtime.limits import SchedulerLimits
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.speculative.options import DraftOptions
from apar.runtime.step import Float32Array, StepInputs
from apar.runtime.text_engine import Prompt, TextEngine
from apar.runtime.tokenizer import Tokenizer

FIXED = (1, 4, 16, 49)
"""Draft nodes of every row, whatever else is in the step."""
Progress = Callable[[int, int], None]
"""Called with runs done, and in all."""


class _Verifier(TimedExecutor):
    """Notes how many tokens each step verified: those that somebody sampled from, or might have."""

    def __init__(self, executor: Executor, bound: int) -> None:
        super().__init__(executor)
        self.memory_bound_tokens = bound
        self.verified: list[int] = []

    def execute(self, inputs: StepInputs) -> Float32Array:
        self.verified.append(inputs.logits_rows.size)
        return super().execute(inputs)

    def logits(self, inputs: StepInputs) -> Float32Array | DeviceLogits:
        self.verified.append(inputs.logits_rows.size)
        return super().logits(inputs)


def rules(options: DraftOptions) -> dict[str, DraftOptions | None]:
    """What is compared: no drafts, the rule that fills the budget, the rule by measured time, and fixed sizes."""
    largest = len(options.paths())
    sizes = sorted({min(size, largest) for size in FIXED})
    fixed = {f"fixed {size}": DraftOptions(**_fields(options, num_speculative_tokens=size)) for size in sizes}
    filled = dataclasses.replace(options, measured=False)
    return {"none": None, "rule": filled, "measured": dataclasses.replace(options, measured=True), **fixed}


def measure_drafts(
    executor: Executor,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: DraftOptions,
    *,
    bound: int | None = None,
    concurrencies: Sequence[int] = (1, 4, 16),
    max_tokens: int = 400,
    limits: SchedulerLimits | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every rule at every concurrency; the result is what `apar bench drafts --json` prints.

    bound: tokens up to which steps count as bound by memory; the executor's own unless given.
    """
    bound = bound or executor.memory_bound_tokens
    verifier = _Verifier(executor, bound)
    limits = limits or SchedulerLimits(prefix_caching=False)
    chosen = rules(options)
    runs: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {}
    total = len(concurrencies) * len(chosen)
    for concurrency in concurrencies:
        for name, rule in chosen.items():
            engine = TextEngine(Engine(verifier, limits, draft=rule), tokenizer)
            verifier.verified.clear()
            began = perf_counter()
            answers = _run(engine, prompts, concurrency, max_tokens)
            seconds = perf_counter() - began
            tokens = sum(answer.request.sampled for answer in answers)
            steps = [count for count in verifier.verified if count]
            speculation = engine.engine.scheduler.speculation
            passes = sum(max(1.0, count / bound) for count in steps)
            texts.setdefault(name, [answer.output().text for answer in answers])
            runs.append(
                {
                    "concurrency": concurrency,
                    "rule": name,
                    "tokens": tokens,
                    "steps": len(steps),
                    "verified": sum(steps),
                    "tokens_per_step": tokens / len(steps),
                    "tokens_per_pass": tokens / passes,
                    "accepted_share": speculation.accepted / max(speculation.drafted, 1) if speculation else 0.0,
                    "seconds": seconds,
                }
            )
            if progress:
                progress(len(runs), total)
    return {
        "bench": "drafts",
        "method": options.method,
        "memory_bound_tokens": bound,
        "prompts": len(prompts),
        "same_texts": all(text == texts["none"] for text in texts.values()),
        "runs": runs,
        "detail": executor.detail,
        "machine": describe_machine(),
    }


def _run(engine: TextEngine, prompts: Sequence[Prompt], concurrency: int, max_tokens: int) -> list[Answer]:
    """Answer all prompts, so many at a time; the answers in order."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    encoded = [engine.encode(prompt) for prompt in prompts]
    answers: list[Answer] = []
    running = 0
    while len(answers) < len(encoded) or running:
        while len(answers) < len(encoded) and running < concurrency:
            answers.append(engine.submit(encoded[len(answers)], params))
            running += 1
        running -= sum(answer.finished for answer in engine.step())
    return answers


def _fields(options: DraftOptions, **changes: Any) -> Mapping[str, Any]:
    """Fields of options for drafts of one size, as far as the step holds them."""
    names = ("method", "medusa_choices", "medusa_widths", "prompt_lookup_max", "prompt_lookup_min")
    return {**{name: getattr(options, name) for name in names}, "adaptive": False, **changes}
