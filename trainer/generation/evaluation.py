"""Answers to held-out records, and their scores."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.dataset import TokenDataset
from trainer.data.templates import stops
from trainer.errors import UserError
from trainer.generation.generate import check_lengths, generate
from trainer.generation.prompts import Prompt, text_of
from trainer.generation.scores import check_libraries, score, unusable
from trainer.session import Session


@dataclass(frozen=True)
class Answered:
    """What a model answers to held-out records; the same on every rank."""

    scores: dict[str, float]
    """By name."""
    answers: list[dict[str, Any]]
    """Per example: record, prompt, text, reference, tokens, whether it ended, and its scores."""


def answer_records(session: Session, data: TokenDataset, examples: np.ndarray) -> Answered:
    """Answers to the first `generation.records` records of `examples`, each the text from its first
    learned token on, with the scores of `generation.scores`, and `ended`, the share of answers that
    an end token or a stop string ended. Collective."""
    options, tokenizer = session.config.generation, session.tokenizer
    chosen = data.first_records(examples, options.records)
    prompts = _prompts(session, data, chosen)
    shown = session.config.log.shown
    seed = session.config.run.seed
    answers = generate(session, [prompt.ids for prompt in prompts], options, seed=seed, shown=shown)
    session.watchdog.alive("the scores of an evaluation")
    texts, references = [a.text for a in answers], [p.reference or "" for p in prompts]
    scores, rows = session.world.on_rank0(lambda: list(score(texts, references, options)))
    lines = [
        {
            "record": int(data.records[example]),
            "prompt": str(tokenizer.decode(prompt.ids)),
            "text": answer.text,
            "reference": prompt.reference,
            "tokens": len(answer.tokens),
            "ended": answer.ended,
            **row,
        }
        for example, prompt, answer, row in zip(chosen, prompts, answers, rows, strict=True)
    ]
    scores["ended"] = sum(answer.ended for answer in answers) / len(answers)
    return Answered(scores, lines)


def check_answers(session: Session) -> None:
    """Raises UserError, naming the record, where answers that evaluations ask for cannot be
    generated or scored: before the first step rather than after the last one."""
    for name in session.config.data.eval_names if session.config.generation.records else ():
        _check_set(session, *session.held_out(name))


def _check_set(session: Session, data: TokenDataset, examples: np.ndarray) -> None:
    options = session.config.generation
    check_libraries(options)
    if set(data.counts.formats) == {"text"}:
        raise UserError(
            f"generation.records: {options.records} given, but the data is plain text, which has "
            "no prompts; accepted: 0, or records with prompts"
        )
    chosen = data.first_records(examples, options.records)
    prompts = _prompts(session, data, chosen)
    check_lengths(session, [prompt.ids for prompt in prompts], options)
    for example, prompt in zip(chosen, prompts, strict=True):
        problem = unusable(prompt.reference or "", options)
        if not prompt.ids:
            problem = "generation.records: nothing before its answer"
        if problem is not None:
            raise UserError(
                f"{problem} (record {int(data.records[example]) + 1} of data.eval, within "
                "data.max_length); accepted: other records, or another generation.pattern or "
                "generation.scores"
            )


def _prompts(session: Session, data: TokenDataset, chosen: np.ndarray) -> list[Prompt]:
    """As training has them: the tokens before what is learned."""
    _, ends = stops(session.tokenizer, session.config.data)
    found = [session.task.prompt_of(data[int(example)]) for example in chosen]
    return [Prompt(ids, text_of(answer, session.tokenizer, ends)) for ids, answer in found]
