"""Writes plain_divergences.json by numpy in float64, not by the package: python tests/golden/regenerate.py"""

import json
from pathlib import Path

import numpy as np

TEACHER = [[4.0, 2.5, 1.0, 0.5, 0.0, -0.5, -1.5, -3.0], [0.2, 3.1, -0.7, 2.9, 0.4, -2.0, 1.6, -1.1]]
STUDENT = [[2.0, 2.6, 0.3, 1.1, -0.4, 0.2, -1.0, -2.5], [0.9, 1.8, 0.1, 2.2, -0.3, -1.2, 2.0, -0.6]]


def forward_kl_mean(temperature: float) -> float:
    p, q = (np.exp(np.array(z) / temperature) for z in (TEACHER, STUDENT))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


if __name__ == "__main__":
    values = {
        "teacher": TEACHER,
        "student": STUDENT,
        "forward_kl_mean": {str(t): forward_kl_mean(t) for t in (1.0, 3.0)},
    }
    Path(__file__).with_name("plain_divergences.json").write_text(json.dumps(values, indent=1) + "\n")
