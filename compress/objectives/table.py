"""Which objectives there are, what each needs, and which may stand together: config refuses the rest.

`python -m compress.objectives` prints the tables of docs/objectives.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from compress.objectives import divergences, hidden, partial
from compress.objectives.divergences import Result
from compress.objectives.hidden import Inside
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
        hidden: what it needs of both models' forwards, `outputs` of layers, `attention` or `embedding`; None for an
            objective of logits.
        inside: from that, in place of `function`.
        whole_vocabulary: it sorts a token's whole distribution, which ranks that share the vocabulary don't have.
    """

    formula: str
    source: str
    use: str
    function: Callable[[Rows, Term], Result] | None = None
    sparse: Mapping[str, Callable[[SparseRows, Term], Result]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    labels_only: bool = False
    pairs: bool = False
    detached: bool = False
    hidden: str | None = None
    inside: Callable[[Inside, Term], Tensor] | None = None
    whole_vocabulary: bool = False


class AnyTerm(Protocol):
    """A term or its settings: which objective, of which [student, teacher] layers."""

    @property
    def objective(self) -> str: ...

    @property
    def layers(self) -> Sequence[Sequence[int]] | None: ...


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
        whole_vocabulary=True,
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
        whole_vocabulary=True,
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
    "hidden_cosine": Objective(
        "1 − cos(W h, h′), h and h′ outputs of mapped layers, W learned where widths differ",
        "Minitron, arXiv 2407.14679, table 17",
        "beside a KL after many layers were removed; [[-3, -3]] in Minitron, no gain after width pruning",
        options=("layers",),
        hidden="outputs",
        inside=hidden.hidden_cosine,
    ),
    "hidden_mse": Objective(
        "‖W h − h′‖² / width",
        "Minitron, arXiv 2407.14679, table 17",
        "as hidden_cosine; a few large channels of the teacher decide, so weight it down",
        options=("layers",),
        hidden="outputs",
        inside=hidden.hidden_mse,
    ),
    "minilm_attention": Objective(
        "mean over heads of KL(softmax(Q′K′ᵀ/√d′) ‖ softmax(QKᵀ/√d)), of the last layer unless said otherwise",
        "MiniLM, arXiv 2002.10957, section 3.1; heads of unequal number split as in MiniLMv2, arXiv 2012.15828",
        "beside a KL, for a student of another width and depth; no gain in Minitron",
        options=("layers",),
        hidden="attention",
        inside=hidden.minilm_attention,
    ),
    "minilm_value": Objective(
        "mean over heads of KL(softmax(V′V′ᵀ/√d′) ‖ softmax(VVᵀ/√d)), causal within a document",
        "MiniLM, arXiv 2002.10957, section 3.2; causal is ours",
        "beside minilm_attention, as MiniLM's second half",
        options=("layers",),
        hidden="attention",
        inside=hidden.minilm_value,
    ),
    "embedding_mse": Objective(
        "‖W e − e′‖² / width, e and e′ input embeddings of the tokens",
        "Minitron, arXiv 2407.14679, table 17",
        "beside a KL and hidden_cosine, after many layers were removed",
        hidden="embedding",
        inside=hidden.embedding_mse,
    ),
}


def needs_hidden_states(terms: Sequence[AnyTerm]) -> bool:
    """Whether any term looks inside the models, which only a teacher that runs can answer."""
    return any(OBJECTIVES[term.objective].hidden for term in terms)


def combines_with(objective: Objective) -> dict[str, bool]:
    """Which teachers it can be had from, and whether with distill.compile and in the search's short distillations."""
    of_logits = objective.function is not None
    return {
        "online": True,
        "cache: sample": objective.labels_only or "sample" in objective.sparse,
        "cache: top_k": objective.labels_only or "top_k" in objective.sparse,
        "previous self": of_logits,
        "compile, search": of_logits,
    }


def markdown() -> str:
    """The objectives, and what each can be combined with."""
    lines = ["| objective | a token's loss | source | when |", "|---|---|---|---|"]
    for name, objective in OBJECTIVES.items():
        formula = objective.formula.replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {objective.source} | {objective.use} |")
    columns = list(combines_with(OBJECTIVES["forward_kl"]))
    lines += ["", f"| objective | options | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name, objective in OBJECTIVES.items():
        marks = ["yes" if holds else "no" for holds in combines_with(objective).values()]
        options = ", ".join(f"`{option}`" for option in objective.options) or "none"
        lines.append(f"| `{name}` | {options} | {' | '.join(marks)} |")
    return "\n".join(lines)
