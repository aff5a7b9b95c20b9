# SPDX-License-Identifier: Apache-2.0
"""Conversations of Chat-B2D: ``<split>/<clip>/<frame>.json``, questions and answers of a frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.data.files import CorruptDataError

# The placeholder of the pictures in a text, its number, and the label of what is not learned.
IMAGE, IMAGE_INDEX, IGNORE = "<image>", -200, -100


@dataclass(frozen=True)
class Round:
    """One question about a frame, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Encoded:
    """A conversation as numbers.

    Attributes:
        ids: (n,) int64 tokens; ``IMAGE_INDEX`` stands where the tokens of the pictures go.
        labels: (n,) int64, the tokens of answers, ``IGNORE`` elsewhere.
    """

    ids: Tensor
    labels: Tensor


def conversation(path: str | Path) -> tuple[Round, ...]:
    """Rounds of one frame; empty if Chat-B2D has none about it.

    Raises:
        CorruptDataError: The file is damaged or no conversation.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptDataError(f"{path}: must be JSON, got {error}") from error
    try:
        return tuple(_round(pair) for pair in held)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDataError(
            f"{path}: must be a list of [question, answer] with 'from' and 'value', got {error}"
        ) from error


def _round(pair: Any) -> Round:
    question, answer = pair
    if (question["from"], answer["from"]) != ("human", "gpt"):
        raise ValueError(f"a round of {question['from']!r} and {answer['from']!r}")
    return Round(question["value"].strip(), answer["value"].strip())


def encode(rounds: Sequence[Round], tokenizer: Any | None, system: str = "") -> Encoded | None:
    """A conversation for a language model of Vicuna's kind (USER: ... ASSISTANT: ...</s>).

    Args:
        rounds: Questions and answers; the first question starts with ``<image>`` if it has none.
        tokenizer: One of Hugging Face's, or None.
        system: What stands before the first question: the system prompt that the language model
            was trained with.

    Returns:
        The tokens; None without a tokenizer or without rounds.
    """
    if tokenizer is None or not rounds:
        return None
    ids: list[int] = []
    labels: list[int] = []
    if tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE)

    def add(text: str, learned: bool) -> None:
        for at, part in enumerate(text.split(IMAGE)):
            if at:
                ids.append(IMAGE_INDEX)
                labels.append(IGNORE)
            if part:
                tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
                ids.extend(tokens)
                labels.extend(tokens if learned else [IGNORE] * len(tokens))

    for at, one in enumerate(rounds):
        question = one.question
        if at == 0 and IMAGE not in question:
            question = f"{IMAGE}\n{question}"
        lead = f"{system} " if at == 0 and system else ""
        add(f"{lead}USER: {question} ASSISTANT:", False)
        add(f" {one.answer}", True)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    return Encoded(torch.tensor(ids), torch.tensor(labels))
