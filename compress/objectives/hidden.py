"""Objectives on what happens inside both models: states of layers and embeddings, and relations between tokens.

Each takes `Inside` and a `Term` and gives its loss, summed over the micro-batch's loss tokens, for autograd. A layer's
number counts from 0, a negative one from the end. Of several pairs of layers the loss is the mean, so that a weight
means the same for any number of them.
"""

# B sequences, T tokens, N loss tokens, D student hidden, E teacher hidden, H query heads, G key-value heads, d head_dim
# R query tokens of a block, S the keys that any of them may see; p teacher, q student

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.objectives.terms import Term, times_log_ratio

_BLOCK_SCORES = 1 << 22  # of H x R x S: 16 MiB in float32, and a handful of such at a time
LAST = ((-1, -1),)
EMBEDDING = "embedding"  # the key of its states and the name of its projection


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer's attention is made from: queries and keys after rotation and norms, values as they are.

    Args:
        scale: what the products of queries and keys are multiplied by.
        softcap: c of c * tanh(scores / c); None: as they are.
        window: how many tokens back are seen, the token itself counted; None: all of its document.
    """

    query_BHTd: Tensor
    key_BGTd: Tensor
    value_BGTd: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Recorded:
    """What one forward of a model was asked to keep.

    Args:
        states_ND: at the loss tokens, by layer the output of it, by EMBEDDING the embedding's.
        attention: by layer, of all tokens.
    """

    states_ND: Mapping[int | str, Tensor]
    attention: Mapping[int, AttentionInputs]


@dataclass(frozen=True)
class Inside:
    """Both models on one micro-batch, and the projections (E, D) by name where their widths differ."""

    student: Recorded
    teacher: Recorded
    projections: Mapping[str, Tensor] | nn.ParameterDict
    position_ids_BT: Tensor
    loss_mask_BT: Tensor


def pairs_of(term: Term) -> Sequence[Sequence[int]]:
    """The [student, teacher] layers that a term compares; the last of each unless it says otherwise."""
    return term.layers or LAST


def projection_name(student: int, teacher: int) -> str:
    return f"layer_{student}_to_{teacher}"


# -- states


def hidden_cosine(inside: Inside, term: Term) -> Tensor:
    """1 - cos of a layer's output, per token: Minitron's best intermediate loss (arXiv 2407.14679, table 17)."""
    return _over_outputs(inside, term, lambda s, t: (1 - F.cosine_similarity(s, t, -1)).sum())


def hidden_mse(inside: Inside, term: Term) -> Tensor:
    """Squared difference of a layer's output per token, as a mean over the teacher's channels."""
    return _over_outputs(inside, term, _squares)


def embedding_mse(inside: Inside, _term: Term) -> Tensor:
    """Squared difference of the tokens' input embeddings, as a mean over the teacher's channels."""
    return _squares(*_comparable(inside, EMBEDDING, EMBEDDING, EMBEDDING))


def _over_outputs(inside: Inside, term: Term, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    pairs = [_comparable(inside, one, other, projection_name(one, other)) for one, other in pairs_of(term)]
    return torch.stack([loss(*states) for states in pairs]).mean()


def _squares(student_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    return (student_NE - teacher_NE).square().mean(-1).sum()


def _comparable(inside: Inside, student: int | str, teacher: int | str, name: str) -> tuple[Tensor, Tensor]:
    """Both states in the teacher's width and in float32 or better; of one width they stay as they are."""
    student_ND, teacher_NE = inside.student.states_ND[student], inside.teacher.states_ND[teacher]
    if student_ND.shape[-1] != teacher_NE.shape[-1]:
        student_ND = F.linear(student_ND, inside.projections[name])
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    return student_ND.to(dtype), teacher_NE.to(dtype)


# -- relations


@dataclass(frozen=True)
class _Relation:
    """Scores of every token with every one before it: left . right * scale, head by head."""

    left_BHTd: Tensor
    right_BHTd: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None

    @property
    def num_heads(self) -> int:
        return self.left_BHTd.shape[1]

    def split_into(self, heads: int) -> _Relation:
        """The same vectors, all heads' side by side, cut anew into so many (MiniLMv2, arXiv 2012.15828)."""
        left, right = _split(self.left_BHTd, heads), _split(self.right_BHTd, heads)
        return _Relation(left, right, left.shape[-1] ** -0.5, None, self.window)


def _split(x_BHTd: Tensor, heads: int) -> Tensor:
    return x_BHTd.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


def minilm_attention(inside: Inside, term: Term) -> Tensor:
    """KL(teacher || student) of attention distributions per query token, mean over heads (arXiv 2002.10957, 3.1).

    Where pruning took heads away both models are split into the same number of relation heads, as in MiniLMv2: these
    are no longer the model's own distributions, but still relations of queries and keys. Raises ConfigError for two
    layers that see different windows.
    """
    return _over_relations(inside, term, _attention)


def minilm_value(inside: Inside, term: Term) -> Tensor:
    """KL(teacher || student) of softmax(V V^T / sqrt(d)), mean over key-value heads (arXiv 2002.10957, section 3.2).

    Causal and within the document: ours, for decoders. The paper's is bidirectional.
    """
    return _over_relations(inside, term, _values)


def _attention(inputs: AttentionInputs) -> _Relation:
    copies = inputs.query_BHTd.shape[1] // inputs.key_BGTd.shape[1]
    key_BHTd = inputs.key_BGTd.repeat_interleave(copies, 1)
    return _Relation(inputs.query_BHTd, key_BHTd, inputs.scale, inputs.softcap, inputs.window)


def _values(inputs: AttentionInputs) -> _Relation:
    return _Relation(inputs.value_BGTd, inputs.value_BGTd, inputs.value_BGTd.shape[-1] ** -0.5)


def _over_relations(inside: Inside, term: Term, relation: Callable[[AttentionInputs], _Relation]) -> Tensor:
    found = []
    for student, teacher in pairs_of(term):
        one, other = relation(inside.student.attention[student]), relation(inside.teacher.attention[teacher])
        if one.window != other.window:
            raise ConfigError(
                f"distill.objectives: {term.objective} compares layer {student} of the student, seeing "
                f"{_seen(one)}, with layer {teacher} of the teacher, seeing {_seen(other)}; give layers= of one kind"
            )
        if one.num_heads != other.num_heads:
            heads = _common_heads(one.left_BHTd, other.left_BHTd)
            one, other = one.split_into(heads), other.split_into(heads)
        found.append(
            _RelationKL.apply(one.left_BHTd, one.right_BHTd, one, other, inside.position_ids_BT, inside.loss_mask_BT)
        )
    return torch.stack(found).mean()


def _seen(relation: _Relation) -> str:
    return "all tokens" if relation.window is None else f"{relation.window} tokens"


def _common_heads(one_BHTd: Tensor, other_BHTd: Tensor) -> int:
    """As many heads as both models' channels can be split into, at most what the one with fewer has."""
    widths = [x.shape[1] * x.shape[3] for x in (one_BHTd, other_BHTd)]
    fewest = min(one_BHTd.shape[1], other_BHTd.shape[1])
    return next(n for n in range(fewest, 0, -1) if not any(width % n for width in widths))


class _RelationKL(torch.autograd.Function):
    """The sum over loss tokens of the mean over heads of KL(p || q), its gradient formed in the forward.

    A block of query tokens at a time: no model's T x T maps are ever held, as fused attention doesn't either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        left_BHTd: Tensor,
        right_BHTd: Tensor,
        student: _Relation,
        teacher: _Relation,
        position_ids_BT: Tensor,
        loss_mask_BT: Tensor,
    ) -> Tensor:
        dtype = torch.promote_types(left_BHTd.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=left_BHTd.device)
        grad_left, grad_right = (torch.zeros_like(x, dtype=dtype) for x in (left_BHTd, right_BHTd))
        scale = student.scale / student.num_heads
        for b in range(len(loss_mask_BT)):
            left_HTd, right_HTd = left_BHTd[b], right_BHTd[b]
            for rows_R in _blocks(loss_mask_BT[b], student.num_heads):
                keys, seen_RS = _seen_keys(position_ids_BT[b], rows_R, student.window)
                log_q_HRS, slope_HRS = log_weights(student, b, rows_R, keys, seen_RS)
                log_p_HRS, _ = log_weights(teacher, b, rows_R, keys, seen_RS)
                p_HRS = log_p_HRS.exp()
                total += times_log_ratio(p_HRS, log_p_HRS, log_q_HRS).sum() / student.num_heads
                gradient_HRS = (log_q_HRS.exp() - p_HRS).mul_(slope_HRS).to(left_BHTd.dtype)
                grad_left[b][:, rows_R] += (gradient_HRS @ right_HTd[:, keys]).to(dtype) * scale
                grad_right[b][:, keys] += (gradient_HRS.mT @ left_HTd[:, rows_R]).to(dtype) * scale
        ctx.save_for_backward(grad_left.to(left_BHTd.dtype), grad_right.to(right_BHTd.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        left_BHTd, right_BHTd = ctx.saved_tensors
        return left_BHTd * grad, right_BHTd * grad, *[None] * 4


def _blocks(loss_mask_T: Tensor, heads: int) -> tuple[Tensor, ...]:
    rows_N = loss_mask_T.nonzero()[:, 0]
    return rows_N.split(max(1, _BLOCK_SCORES // (heads * len(loss_mask_T)))) if len(rows_N) else ()


def _seen_keys(position_ids_T: Tensor, rows_R: Tensor, window: int | None) -> tuple[slice, Tensor]:
    """A stretch of tokens that holds all that the rows see, and which of it each does (R, S).

    Positions restart with each document, so a token's document begins its position's number of tokens before it.
    """
    back_R = position_ids_T[rows_R] if window is None else position_ids_T[rows_R].clamp_max(window - 1)
    first_R = rows_R - back_R
    low, high = int(first_R.min()), int(rows_R.max()) + 1
    keys_S = torch.arange(low, high, device=rows_R.device)
    return slice(low, high), (keys_S >= first_R[:, None]) & (keys_S <= rows_R[:, None])


def log_weights(
    relation: _Relation, b: int, rows_R: Tensor, keys: slice, seen_RS: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Log of what each row gives to each key (H, R, S), -inf where it sees none, and the soft cap's slope there."""
    scores_HRS = relation.left_BHTd[b][:, rows_R] @ relation.right_BHTd[b][:, keys].mT
    scores_HRS = scores_HRS.to(torch.promote_types(scores_HRS.dtype, torch.float32)) * relation.scale
    slope_HRS: Tensor | float = 1.0
    if relation.softcap is not None:
        tanh_HRS = torch.tanh(scores_HRS / relation.softcap)
        scores_HRS, slope_HRS = tanh_HRS * relation.softcap, 1 - tanh_HRS.square()
    return torch.log_softmax(scores_HRS.masked_fill(~seen_RS, -torch.inf), -1), slope_HRS
