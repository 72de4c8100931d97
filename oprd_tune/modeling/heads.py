"""The LM head as a matrix: logits of a chunk of states, and products with a few of the head's rows.

Logits are fp32 (fp64 for fp64 weights) even if the weights are bf16, because two of the largest logits often round to
the same bf16 number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from oprd_tune.errors import ConfigError

_BLOCK_BYTES = 32 * 2**20  # largest block of head rows that is gathered or converted at once


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


class LMHead:
    """A decoder's head, tied to its embedding or not. It keeps the module and looks the weight up at each use.

    Args:
        model: a torchtune decoder whose head is not swapped.
        name: the model's config key, for messages.

    Attributes:
        layer: number of the decoder's last layer, whose state the head reads.
        module: the module that holds the head's weight; of a tied head the embedding.

    Raises:
        ConfigError: if the head is more than a matrix.
    """

    def __init__(self, model: TransformerDecoder, name: str = "model") -> None:
        if (what := why_no_matrix(model)) is not None:
            raise ConfigError(
                f"{name}: its {what}; token losses need the plain product with one matrix. Give another model, leave "
                "the head without adapter (LoRA: apply_lora_to_output=false), or take a loss on hidden states, by "
                "oprd_distributed"
            )
        self.layer, self.module = len(model.layers), _module_of(model.output)

    @property
    def weight_VD(self) -> Tensor:
        """The head's weight, one row per token."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight


def why_no_matrix(model: TransformerDecoder) -> str | None:
    """What makes a decoder's LM head more than a product with one matrix, such as `logits are capped`; else None."""
    if (what := getattr(model.output, "more_than_a_matrix", None)) is not None:
        return f"logits are {what}"
    module = _module_of(model.output)
    if not isinstance(module, (nn.Linear, nn.Embedding)) or getattr(module, "bias", None) is not None:
        return f"LM head is {type(module).__name__}{' with a bias' if isinstance(module, nn.Linear) else ''}"
    return None


def _module_of(output: nn.Module) -> nn.Module:
    return output.tied_module if isinstance(output, TiedLinear) else output


@dataclass(frozen=True)
class Heads:
    """The heads of student and teacher. Rows from `vocabulary` on, which only one of them may have, are left out."""

    student: LMHead
    teacher: LMHead
    vocabulary: int

    @property
    def student_VD(self) -> Tensor:
        """The student's rows, detached."""
        return self.student.weight_VD.detach()[: self.vocabulary]

    @property
    def teacher_VC(self) -> Tensor:
        """The teacher's rows, detached."""
        return self.teacher.weight_VD.detach()[: self.vocabulary]


def head_logits(state_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """All logits of a chunk of states, [T, V], in at least fp32."""
    dtype = wide(weight_VD.dtype)
    if weight_VD.dtype == dtype:
        return state_TD.to(dtype) @ weight_VD.T
    if weight_VD.is_cuda:
        return torch.mm(state_TD.to(weight_VD.dtype), weight_VD.T, out_dtype=dtype)
    logits_TV = torch.empty(len(state_TD), len(weight_VD), dtype=dtype, device=weight_VD.device)
    for start, rows_RD in row_blocks(weight_VD):
        logits_TV[:, start : start + len(rows_RD)] = state_TD.to(dtype) @ rows_RD.to(dtype).T
    return logits_TV


def gathered_logits(state_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor) -> Tensor:
    """Logits of K tokens at each state, [T, K], in at least fp32: K dot products instead of V."""
    dtype = wide(weight_VD.dtype)
    logits_TK = torch.empty(ids_TK.shape, dtype=dtype, device=weight_VD.device)
    tokens = max(1, _BLOCK_BYTES // (ids_TK.shape[1] * weight_VD.shape[1] * dtype.itemsize))
    for start in range(0, len(ids_TK), tokens):
        rows_TKD = weight_VD[ids_TK[start : start + tokens]].to(dtype)
        state_TD1 = state_TD[start : start + tokens].to(dtype).unsqueeze(-1)
        logits_TK[start : start + tokens] = torch.bmm(rows_TKD, state_TD1).squeeze(-1)
    return logits_TK


def weighted_rows(weight_VD: Tensor, ids_TK: Tensor, factor_TK: Tensor) -> Tensor:
    """Σ_k factor_tk · W[ids_tk], [T, D], in the weight's dtype. The gathered rows are not stored."""
    return F.embedding_bag(ids_TK, weight_VD, per_sample_weights=factor_TK.to(weight_VD.dtype), mode="sum")


def add_product(grad_VD: Tensor, logits_TV: Tensor, state_TD: Tensor) -> None:
    """grad += logitsᵀ · state, in place. A gradient of a wider dtype than its factors is updated in blocks of rows."""
    if grad_VD.dtype == logits_TV.dtype:
        grad_VD.addmm_(logits_TV.T, state_TD)
        return
    for start, rows_RD in row_blocks(grad_VD):
        rows_RD += logits_TV[:, start : start + len(rows_RD)].T @ state_TD


def add_outer_rows(grad_VD: Tensor, ids_TK: Tensor, factor_TK: Tensor, state_TD: Tensor) -> None:
    """grad[v] += Σ over (t, k) with ids_tk = v of factor_tk · state_t, in place.

    Each row is summed in fp32 and then added once. So a frequent token's many small terms do not vanish in a bf16
    buffer, and the result does not depend on the order of threads. Of a GPU, the host reads how many rows there are.
    """
    dtype = wide(grad_VD.dtype)
    flat, order = ids_TK.flatten().sort(stable=True)
    token, factor = order // ids_TK.shape[1], factor_TK.flatten()[order].to(dtype)
    row, length = flat.unique_consecutive(return_counts=True)
    rows = max(1, _BLOCK_BYTES // (grad_VD.shape[1] * dtype.itemsize))
    state_TD = state_TD.to(dtype)
    end = length.cumsum(0)
    edges = [0, *end[rows - 1 :: rows].tolist(), len(flat)]
    for number, first in enumerate(range(0, len(row), rows)):
        block, terms = slice(first, first + rows), slice(edges[number], edges[number + 1])
        offset = end[block] - length[block] - edges[number]
        sums_RD = F.embedding_bag(token[terms], state_TD, offset, per_sample_weights=factor[terms], mode="sum")
        grad_VD.index_add_(0, row[block], sums_RD.to(grad_VD.dtype))


def row_blocks(weight_VD: Tensor) -> list[tuple[int, Tensor]]:
    """Views of a few rows each, with the index of their first row."""
    rows = max(1, _BLOCK_BYTES // (weight_VD.shape[1] * 4))
    return [(i * rows, block) for i, block in enumerate(weight_VD.split(rows))]
