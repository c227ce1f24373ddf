"""Writes objectives.json by numpy in float64, not by the package: python tests/golden/regenerate.py

Two tokens, eight ids. Each value is computed token by token from the formulas of the papers.
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

TEACHER = [[4.0, 2.5, 1.0, 0.5, 0.0, -0.5, -1.5, -3.0], [0.2, 3.1, -0.7, 2.9, 0.4, -2.0, 1.6, -1.1]]
STUDENT = [[2.0, 2.6, 0.3, 1.1, -0.4, 0.2, -1.0, -2.5], [0.9, 1.8, 0.1, 2.2, -0.3, -1.2, 2.0, -0.6]]
PREVIOUS = [[1.5, 2.2, 0.1, 0.9, -0.2, 0.0, -0.8, -2.0], [0.6, 1.1, 0.3, 1.9, -0.1, -0.9, 1.4, -0.2]]
LABELS = [0, 3]
# Of two heads and three tokens; 4 channels a head of the teacher, 2 of the student.
MINILM = {
    "Q_t": [
        [[0.1, 0.974, -0.351, -0.883], [0.578, 0.734, -0.768, -0.537], [0.906, 0.303, -0.984, -0.05]],
        [[0.997, -0.207, -0.943, 0.45], [0.827, -0.664, -0.656, 0.833], [0.442, -0.947, -0.198, 0.998]],
    ],
    "K_t": [
        [[0.644, 0.675, -0.818, -0.465], [0.938, 0.223, -0.995, 0.034], [0.987, -0.288, -0.913, 0.523]],
        [[0.778, -0.723, -0.591, 0.876], [0.366, -0.97, -0.116, 1.0], [-0.142, -0.963, 0.39, 0.863]],
    ],
    "V_t": [
        [[0.964, 0.141, -1.0, 0.117], [0.97, -0.366, -0.875, 0.592], [0.723, -0.778, -0.522, 0.913]],
        [[0.287, -0.987, -0.033, 0.995], [-0.224, -0.938, 0.465, 0.818], [-0.676, -0.644, 0.842, 0.427]],
    ],
    "Q_s": [[[0.389, 0.863], [-0.612, -0.706], [0.794, 0.501]], [[-0.923, -0.263], [0.991, 0.008], [-0.993, 0.248]]],
    "K_s": [[[0.891, 0.335], [-0.978, -0.083], [0.999, -0.174]], [[-0.954, 0.42], [0.846, -0.638], [-0.681, 0.814]]],
    "V_s": [[[0.808, -0.688], [-0.631, 0.85], [0.412, -0.957]], [[-0.166, 0.999], [-0.092, -0.976], [0.343, 0.887]]],
}


def softmax(logits, temperature=1.0):
    p = np.exp(np.array(logits) / temperature)
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def of_distributions(function, temperature=1.0):
    """function(p, q, label) of the teacher's and the student's distributions, as one of their logits."""
    return lambda teacher, student, label: function(softmax(teacher, temperature), softmax(student, temperature), label)


def per_token(formula, teacher=TEACHER):
    return [float(formula(*row)) for row in zip(np.array(teacher), np.array(STUDENT), LABELS, strict=True)]


def gradient(formula, teacher=TEACHER, size=1e-5):
    """Of each token's value in the student's logits, by central differences."""
    found = []
    for row, logits, label in zip(np.array(teacher), np.array(STUDENT), LABELS, strict=True):
        steps = size * np.eye(len(logits))
        found.append([(formula(row, logits + d, label) - formula(row, logits - d, label)) / (2 * size) for d in steps])
    return np.array(found).tolist()


def jensen_shannon(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p, q, head_mass=0.5):
    order = np.argsort(-p, kind="stable")
    head, mass = [], 0.0
    for place in order:
        if head and mass + p[place] > head_mass:
            break
        head.append(place)
        mass += p[place]
    gap = np.abs(p - q)
    share = gap[head].sum() / gap.sum()
    return share * kl(p, q) + (1 - share) * kl(q, p)


def bucketed(p, q, k):
    top = np.argsort(-p, kind="stable")[:k]
    return kl(np.append(p[top], 1 - p[top].sum()), np.append(q[top], 1 - q[top].sum()))


def bild(teacher, student, k, temperature):
    total = 0.0
    for leader in (teacher, student):
        pairs = list(combinations(np.argsort(-leader, kind="stable")[:k], 2))
        differences = [np.array([(z[i] - z[j]) / temperature for i, j in pairs]) for z in (teacher, student)]
        total += kl(*(softmax(d) for d in differences))
    return total


def dac(p, q, low, high):
    limits = np.quantile(p, [low, high])
    kept = (p >= limits[0]) & (p <= limits[1])
    kept[p.argmax()] = True
    return kl(p[kept] / p[kept].sum(), q[kept] / q[kept].sum())


def entropy_weight(p):
    return float(-(p * np.log(p)).sum() / np.log(len(p)))


def dynamic(teacher, student, max_temperature):
    p = softmax(teacher)
    first, second = np.sort(p)[::-1][:2]
    temperature = 1 + (max_temperature - 1) * (first - second)
    return (1 - entropy_weight(p)) * temperature**2 * kl(softmax(teacher, temperature), softmax(student, temperature))


def relation(left, right):
    """Every head's softmax over the tokens up to the row's own."""
    found = []
    for one, other in zip(np.array(left), np.array(right), strict=True):
        scores = one @ other.T / np.sqrt(one.shape[1])
        found.append([softmax(scores[row, : row + 1]) for row in range(len(scores))])
    return found


def relation_kl(teacher, student):
    """Mean over heads and tokens."""
    rows = [kl(p, q) for one, other in zip(teacher, student, strict=True) for p, q in zip(one, other, strict=True)]
    return sum(rows) / len(rows)


FORMULAS = {
    "forward_kl": of_distributions(lambda p, q, _: kl(p, q)),
    "forward_kl temperature=3": of_distributions(lambda p, q, _: kl(p, q), 3.0),
    "reverse_kl": of_distributions(lambda p, q, _: kl(q, p)),
    "reverse_kl temperature=3": of_distributions(lambda p, q, _: kl(q, p), 3.0),
    "jensen_shannon": of_distributions(lambda p, q, _: jensen_shannon(p, q, 0.5)),
    "jensen_shannon beta=0.9": of_distributions(lambda p, q, _: jensen_shannon(p, q, 0.9)),
    "jensen_shannon beta=0.1": of_distributions(lambda p, q, _: jensen_shannon(p, q, 0.1)),
    "skew_kl": of_distributions(lambda p, q, _: kl(p, 0.1 * p + 0.9 * q)),
    "skew_kl skew=0.3": of_distributions(lambda p, q, _: kl(p, 0.3 * p + 0.7 * q)),
    "skew_reverse_kl": of_distributions(lambda p, q, _: kl(q, 0.9 * p + 0.1 * q)),
    "skew_reverse_kl skew=0.3": of_distributions(lambda p, q, _: kl(q, 0.7 * p + 0.3 * q)),
    "total_variation": of_distributions(lambda p, q, _: np.abs(p - q).sum() / 2),
    "adaptive_kl": of_distributions(lambda p, q, _: adaptive(p, q)),
    "top_k_kl k=4": of_distributions(lambda p, q, _: bucketed(p, q, 4)),
    "bild k=3 temperature=3": lambda teacher, student, _: bild(teacher, student, 3, 3.0),
    "bild k=4 temperature=3": lambda teacher, student, _: bild(teacher, student, 4, 3.0),
    "bild k=8 temperature=3": lambda teacher, student, _: bild(teacher, student, 8, 3.0),
    "bild k=4": lambda teacher, student, _: bild(teacher, student, 4, 1.0),
    "dac_kl lower_quantile=0.5": of_distributions(lambda p, q, _: dac(p, q, 0.5, 1.0)),
    "uncertainty_kl": of_distributions(lambda p, q, _: entropy_weight(q) * kl(p, q)),
    "dynamic_kl": lambda teacher, student, _: dynamic(teacher, student, 3.0),
    "cross_entropy": of_distributions(lambda _, q, label: -np.log(q[label])),
    "label_smoothing smoothing=0.3": of_distributions(
        lambda p, q, label: -0.7 * np.log(q[label]) - 0.3 * (p * np.log(q)).sum()
    ),
}
WEIGHTED = ("adaptive_kl", "uncertainty_kl")  # by what no gradient goes through


def dlb(previous, student, label):
    """Cross-entropy and 3**2 KL at temperature 3 against what the model itself said before."""
    own = 9 * kl(softmax(previous, 3.0), softmax(student, 3.0))
    return -np.log(softmax(student)[label]) + own


if __name__ == "__main__":
    teacher, student = np.array(TEACHER), np.array(STUDENT)
    p, q, previous = softmax(TEACHER), softmax(STUDENT), softmax(PREVIOUS, 3.0)
    span = ((p[0] * p[1] - q[0] * q[1]) ** 2).sum()
    values = {
        "teacher": TEACHER,
        "student": STUDENT,
        "previous": PREVIOUS,
        "labels": LABELS,
        "per_token": {name: per_token(formula) for name, formula in FORMULAS.items()},
        "gradient": {name: gradient(formula) for name, formula in FORMULAS.items() if name not in WEIGHTED},
        "span_relation": float(span),
        "tie": bild(np.array([2.0, 1.0, 1.0, 0.0]), np.array([1.5, 0.2, 0.9, -0.3]), 3, 3.0),
        "previous_self": {
            "kl temperature=3": [kl(a, b) for a, b in zip(previous, softmax(STUDENT, 3.0), strict=True)],
            "dlb": per_token(dlb, PREVIOUS),
            "dlb gradient": gradient(dlb, PREVIOUS),
        },
    }
    values["minilm"] = MINILM | {
        "attention": relation_kl(relation(MINILM["Q_t"], MINILM["K_t"]), relation(MINILM["Q_s"], MINILM["K_s"])),
        "value": relation_kl(relation(MINILM["V_t"], MINILM["V_t"]), relation(MINILM["V_s"], MINILM["V_s"])),
    }
    Path(__file__).with_name("objectives.json").write_text(json.dumps(values, indent=1) + "\n")
