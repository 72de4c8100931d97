"""Tokenizes responses for a teacher with another tokenizer, and finds which states of student and teacher meet.

At each token, a model has read a certain number of UTF-8 bytes of the response. A student state and a teacher state
meet if both models have read the same number of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oprd_tune.data.token_bytes import TokenBytes
from oprd_tune.data.tokenizer import HuggingFaceTokenizer
from oprd_tune.errors import ConfigError
from oprd_tune.types import Reading, Rollout

Integers = NDArray[np.int64]


class Reader:
    """Tokenizes sampled responses for the teacher and aligns both tokenizations.

    Raises ConfigError if a tokenizer is of another class, or if its tokens do not stand for bytes.
    """

    def __init__(self, student: HuggingFaceTokenizer, teacher: HuggingFaceTokenizer) -> None:
        for side, tokenizer in (("student", student), ("teacher", teacher)):
            if not isinstance(tokenizer, HuggingFaceTokenizer):
                raise ConfigError(
                    f"the {side}'s tokenizer is a {type(tokenizer).__name__}; a teacher with another tokenizer needs "
                    "oprd_tune.data.HuggingFaceTokenizer on both sides: give it as _component_, with a model folder"
                )
        self._student, self._teacher = student.token_bytes, teacher.token_bytes
        self._student_stops = frozenset(student.stop_tokens)
        self._teacher_tokenizer = teacher
        self._teacher_stop = teacher.end_of_turn

    def read(self, rollout: Rollout, teacher_prompts: Sequence[Sequence[int]]) -> Reading:
        """Tokenize each row for the teacher, and find the columns where both models have read the same bytes.

        The teacher reads the longest prefix of the response that is text. This prefix ends before the first special
        token and before the first bytes that are not UTF-8. If it is the whole response and the response has ended,
        then the teacher's `end_of_turn` follows and meets the student's stop token. If several states of a model have
        read the same bytes, only the last of them meets another. A tokenizer may change the text that it encodes;
        after the first byte that differs, no states meet.

        `teacher_prompts` holds the prompt of each row in the teacher's tokens. The result is on the rollout's device.

        Raises:
            ValueError: if a prompt is missing or empty.
        """
        if len(teacher_prompts) != len(rollout) or not all(map(len, teacher_prompts)):
            raise ValueError(f"{len(rollout)} rows need as many prompts of the teacher's, none of them empty")
        tokens_BS = rollout.tokens_BS.cpu().numpy()
        lengths, sizes = rollout.lengths_B.tolist(), rollout.response_mask_BS.sum(1).tolist()
        responses = [
            _understand(tokens_BS[row, length - size : length], self._student, self._student_stops)
            for row, (length, size) in enumerate(zip(lengths, sizes, strict=True))
        ]
        encoded = self._teacher_tokenizer.encode_batch([response.text for response in responses])
        column_BS = np.full(tokens_BS.shape, -1)
        rows = []
        for row, (prompt, response, ids) in enumerate(zip(teacher_prompts, responses, encoded, strict=True)):
            column_N, agrees = _meet(response, np.array(ids, dtype=np.int64), self._teacher)
            first = lengths[row] - sizes[row] - 1
            if first < 0:
                raise ValueError(f"row {row} has no prompt")
            column_BS[row, first : first + len(column_N)] = np.where(column_N < 0, -1, column_N + len(prompt) - 1)
            rows.append([*prompt, *ids, *([self._teacher_stop] if response.ends else [])])
            if response.ends and agrees:
                column_BS[row, lengths[row] - 1] = len(rows[-1]) - 1
        return self._reading(rows, column_BS, rollout.tokens_BS.device)

    def _reading(self, rows: Sequence[Sequence[int]], column_BS: Integers, device: torch.device) -> Reading:
        tokens_BU = np.full((len(rows), max(map(len, rows))), self._teacher_tokenizer.pad_id)
        for row, tokens in enumerate(rows):
            tokens_BU[row, : len(tokens)] = tokens
        return Reading(
            tokens_BU=torch.from_numpy(tokens_BU).to(device),
            lengths_B=torch.tensor([len(tokens) for tokens in rows], device=device),
            column_BS=torch.from_numpy(column_BS).to(device),
        )


class PromptReader:
    """Puts responses behind the prompts of a teacher that shares the student's tokens and reads other prompts.

    Args:
        pad_id: fills the teacher's rows.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def read(self, rollout: Rollout, teacher_prompts: Sequence[Sequence[int]]) -> Reading:
        """Each state meets the teacher's at the same token of the response, from the prompt's last column on."""
        columns_S = torch.arange(rollout.tokens_BS.shape[1], device=rollout.tokens_BS.device)
        prompt_B = rollout.lengths_B - rollout.response_mask_BS.sum(1)
        own_B = torch.tensor([len(prompt) for prompt in teacher_prompts], device=rollout.tokens_BS.device)
        column_BS = columns_S + (own_B - prompt_B)[:, None]
        meets_BS = (columns_S >= prompt_B[:, None] - 1) & (columns_S < rollout.lengths_B[:, None])
        lengths_B = rollout.lengths_B + own_B - prompt_B
        tokens_BU = torch.full((len(rollout), int(lengths_B.max())), self._pad_id)
        ends = zip(prompt_B.tolist(), rollout.lengths_B.tolist(), strict=True)
        for row, (prompt, (start, end)) in enumerate(zip(teacher_prompts, ends, strict=True)):
            tokens_BU[row, : len(prompt)] = torch.tensor(prompt)
            tokens_BU[row, len(prompt) : len(prompt) + end - start] = rollout.tokens_BS[row, start:end]
        return Reading(tokens_BU.to(column_BS.device), lengths_B, column_BS.where(meets_BS, -1))


def side_by_side(readings: Sequence[tuple[Tensor, Reading]]) -> Reading:
    """One reading of all rows of a rollout, from readings of some rows each.

    Args:
        readings: the indices of rows, and their reading. Each row of the rollout is in one of them.
    """
    rows = sum(len(index_B) for index_B, _ in readings)
    first = readings[0][1]
    columns = max(reading.column_BS.shape[1] for _, reading in readings)
    width = max(reading.tokens_BU.shape[1] for _, reading in readings)
    tokens_BU = first.tokens_BU.new_zeros(rows, width)
    column_BS, lengths_B = first.column_BS.new_full((rows, columns), -1), first.lengths_B.new_zeros(rows)
    for index_B, reading in readings:
        tokens_BU[index_B, : reading.tokens_BU.shape[1]] = reading.tokens_BU
        column_BS[index_B, : reading.column_BS.shape[1]] = reading.column_BS
        lengths_B[index_B] = reading.lengths_B
    return Reading(tokens_BU, lengths_B, column_BS)


@dataclass(frozen=True)
class _Response:
    """A response as text.

    Attributes:
        text: the longest prefix of the response that is text.
        data: that prefix in UTF-8.
        offset_N: bytes read at the prompt's last column, then after each token before the first special one.
        ends: whether a stop token ends the response and all before it is text.
    """

    text: str
    data: bytes
    offset_N: Integers
    ends: bool


def _understand(tokens_T: Integers, own: TokenBytes, stops: frozenset[int]) -> _Response:
    ended = len(tokens_T) > 0 and int(tokens_T[-1]) in stops
    body_T = tokens_T[:-1] if ended else tokens_T
    data, sizes_T = own.read(body_T)
    dropped = int(own.decoding_drops_space and data.startswith(b" "))
    data = data[dropped:]
    text = _text_prefix(data)
    read = text.encode()
    return _Response(text, read, _offsets(sizes_T, dropped), ended and len(sizes_T) == len(body_T) and read == data)


def _meet(response: _Response, ids: Integers, own: TokenBytes) -> tuple[Integers, bool]:
    """The teacher token that meets each state of the response, and whether both models read the same text to the end.

    Teacher tokens are counted from 0, which is the prompt's last column; -1 stands for no token.
    """
    data, sizes_T = own.read(ids)
    added = own.space_added(data, response.data)
    data, end_M, offset_N = data[added:], _offsets(sizes_T, added), response.offset_N
    common = _common_prefix(data, response.data)
    last_N = np.append(offset_N[1:] != offset_N[:-1], True)
    token_N = np.searchsorted(end_M, offset_N, side="right") - 1
    meets_N = last_N & (offset_N <= common) & (end_M[token_N] == offset_N)
    return np.where(meets_N, token_N, -1), data == response.data


def _offsets(sizes_T: Integers, without: int) -> Integers:
    """Bytes read before the first token and after each token. The first `without` bytes do not count."""
    return np.maximum(np.concatenate([[0], np.cumsum(sizes_T)]) - without, 0)


def _text_prefix(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _common_prefix(one: bytes, other: bytes) -> int:
    """How many bytes two texts share from their start."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    differs = np.frombuffer(one, np.uint8, shorter) != np.frombuffer(other, np.uint8, shorter)
    return int(differs.argmax())
