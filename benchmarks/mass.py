"""How much of the teacher's distribution its k most likely tokens hold: what a top-k cache would keep.

    python -m benchmarks.mass                       # from the repository's root; a minute

SmolLM2-135M-Instruct at 8,192 tokens of each validation set of the recipe smollm2_135m_to_100m, in float32. For each k:
the mean mass, the share of tokens at which it is over 99 %, and the smallest.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import log_plainly, machine, pipeline_arguments, start_as_the_makefile_does, write_result

TOP = (8, 64, 256, 1024, 4096)
CHUNK = 256


def main() -> None:
    parser = pipeline_arguments(__doc__, "mass")
    options = parser.parse_args()
    start_as_the_makefile_does()
    log_plainly()
    import torch

    from compress.config import load_config
    from compress.evaluate import sets_of
    from compress.inputs import teacher_of
    from compress.models import load_model, logits_of, output_head
    from compress.pipeline import run
    from compress.step import trunk

    config = load_config(
        "recipe=smollm2_135m_to_100m", f'run_dir="{options.runs}"', "until=tokenize", "evaluate.max_tokens=8192",
        *options.set,
    )  # fmt: skip
    run(config)
    model = load_model(teacher_of(config), torch.float32).eval()
    head, found = output_head(model), {}
    with torch.inference_mode():
        for name, batches in sets_of(config, options.runs).items():
            masses = []
            for batch in batches:
                for hidden_CD in trunk(model, batch)[batch.loss_mask].split(CHUNK):
                    largest_CK = logits_of(hidden_CD, head).softmax(-1).topk(max(TOP), -1).values
                    masses.append(largest_CK.double().cumsum(-1)[:, [k - 1 for k in TOP]])
            mass_NK = torch.cat(masses)
            found[name] = {k: _figures(mass_NK[:, column]) for column, k in enumerate(TOP)}
            for k, row in found[name].items():
                print(f"{name}: top {k:>4}: mean {row['mean']:.4f}, over 99 % at {row['over_99']:.1%} of "
                      f"{len(mass_NK)} tokens, least {row['least']:.3f}")  # fmt: skip
    write_result(options.output, {"machine": machine(), "sets": found})


def _figures(mass_N: Any) -> dict[str, float]:
    return {
        "mean": mass_N.mean().item(), "over_99": (mass_N > 0.99).double().mean().item(), "least": mass_N.min().item(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
