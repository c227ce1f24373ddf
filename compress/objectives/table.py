"""Which objectives there are, what each needs, and which may stand together: config refuses the rest.

`python -m compress.objectives.table` prints the matrix of docs/objectives.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from compress.objectives import divergences, partial
from compress.objectives.divergences import Result
from compress.objectives.terms import Rows, SparseRows, Term


@dataclass(frozen=True)
class Objective:
    """What a term computes, and from what.

    Args:
        function: from both models' logits; None for an objective of hidden states.
        sparse: kind of cached signal -> function, where a cache will do.
        options: the fields of `Term` that it reads beside weight and temperature.
        labels_only: no teacher is asked.
        pairs: of neighbouring tokens; its mean is over those.
        detached: a weight in it depends on the student and carries no gradient, which is then not the value's slope.
    """

    formula: str
    source: str
    use: str
    function: Callable[[Rows, Term], Result]
    sparse: Mapping[str, Callable[[SparseRows, Term], Result]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    labels_only: bool = False
    pairs: bool = False
    detached: bool = False


OBJECTIVES: dict[str, Objective] = {
    "forward_kl": Objective(
        "KL(p ‖ q)",
        "Minitron, arXiv 2407.14679, section 4.1",
        "the default: the student covers all that the teacher may say",
        divergences.forward_kl,
        {"sample": partial.sparse_forward_kl},
    ),
    "reverse_kl": Objective(
        "KL(q ‖ p)",
        "MiniLLM's single-step term, arXiv 2306.08543",
        "a student too small to cover everything keeps to the teacher's main modes",
        divergences.reverse_kl,
    ),
    "jensen_shannon": Objective(
        "β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q",
        "GKD, arXiv 2306.13649, section 3",
        "between the two, bounded",
        divergences.jensen_shannon,
        options=("beta",),
    ),
    "skew_kl": Objective(
        "KL(p ‖ λ p + (1 − λ) q)",
        "DistiLLM, arXiv 2402.03898, section 3.1",
        "forward KL with bounded gradients, early on or far from the teacher",
        divergences.skew_kl,
        options=("skew",),
    ),
    "skew_reverse_kl": Objective(
        "KL(q ‖ (1 − λ) p + λ q)",
        "DistiLLM, arXiv 2402.03898, section 3.1",
        "reverse KL with bounded gradients",
        divergences.skew_reverse_kl,
        options=("skew",),
    ),
    "total_variation": Objective(
        "½ Σ |p − q|",
        "f-DISTILL, arXiv 2307.15190",
        "robust to noise in the teacher's tail; slow far from the teacher",
        divergences.total_variation,
    ),
    "adaptive_kl": Objective(
        "g_head/g KL(p ‖ q) + g_tail/g KL(q ‖ p), g = Σ |p − q| over p's head and tail",
        "Wu et al., arXiv 2404.02657, section 4",
        "forward KL where the head is off, reverse KL where the tail is",
        divergences.adaptive_kl,
        options=("head_mass",),
        detached=True,
    ),
    "top_k_kl": Objective(
        "KL over the teacher's k largest and one bucket of all others",
        "Megatron-LM's ghost token; NeMo",
        "from a top-k cache; the bucket keeps it a divergence",
        partial.top_k_kl,
        {"top_k": partial.sparse_top_k_kl},
        options=("k",),
    ),
    "bild": Objective(
        "Σ over leaders t, s: KL(softmax d_t ‖ softmax d_s), d the differences of all pairs of its k largest logits",
        "BiLD, arXiv 2406.13555, section 3",
        "the order of the likely tokens, nothing about the tail; T = 3 and k = 8 in the paper",
        partial.bild,
        options=("k",),
    ),
    "dac_kl": Objective(
        "KL(p' ‖ q'), both renormalised on {a ≤ p ≤ b} and p's largest, a and b quantiles of p",
        "ours: the fixed-quantile ablation of DAC-KL, arXiv 2407.10068",
        "leaves out the teacher's tail",
        partial.dac_kl,
        options=("lower_quantile", "upper_quantile"),
    ),
    "span_relation": Objective(
        "‖p_t p_{t+1} − q_t q_{t+1}‖²",
        "ours, after MGSR's span term, arXiv 2407.10068",
        "beside a KL: whether neighbouring tokens go together; tiny on large vocabularies, so weight it up",
        partial.span_relation,
        pairs=True,
    ),
    "uncertainty_kl": Objective(
        "H(q)/log V · KL(p ‖ q)",
        "Dynamic KD, Li et al., EMNLP 2021",
        "spends the step on what the student is still unsure of",
        divergences.uncertainty_kl,
        detached=True,
    ),
    "dynamic_kl": Objective(
        "(1 − u) τ² KL(p ‖ q) at temperature τ = 1 + (τ_max − 1) d, u = H(p)/log V, d = p₁ − p₂",
        "ours, for DynSDPB, arXiv 2411.16991, whose rule could not be read",
        "a teacher that errs early on, as a model's own earlier word (teacher.mode=previous_self)",
        divergences.dynamic_kl,
        options=("max_temperature",),
    ),
    "cross_entropy": Objective(
        "−log q(next token)",
        "ordinary training",
        "a little beside a KL, when the training text is close to what the student will see",
        divergences.cross_entropy,
        labels_only=True,
    ),
    "label_smoothing": Objective(
        "−Σ ((1 − ε) y + ε p) log q",
        "Hinton et al., arXiv 1503.02531, as one target",
        "labels, smoothed by what the teacher says",
        divergences.label_smoothing,
        options=("smoothing",),
    ),
}
