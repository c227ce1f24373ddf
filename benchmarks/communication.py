"""What the links carry in a distillation step of 8 to 1024 GPUs, as stage=plan reckons: the table and plot of the docs.

    pip install matplotlib && python -m benchmarks.communication      # from the repository's root; some seconds

Llama-3.1-8B to 4B by width on nodes of eight H100 (conf/cluster/h100.yaml: what is computed at 40 % of 989e12 FLOP/s,
450 GB/s within a node, 50 GB/s a GPU between nodes, each way), a step of 2,048 sequences of 8,192 tokens in
micro-batches of one. Nothing is measured here: `benchmarks/collectives.py` measures that the bytes are right. Writes
the table into docs/cluster.md, between its marks, and docs/communication.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.common import ROOT
from compress.config import load_config
from compress.plan import Plan, link_seconds, make_plan

DOCS = ROOT / "docs"
BEGIN, END = "<!-- benchmarks/communication.py -->\n", "<!-- end -->\n"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARED = {"a node": 8, "64": 64, "all": 0}
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SETTINGS = [
    "recipe=llama31_8b_to_4b_width", "cluster=h100", "stage=plan", "distill.global_batch_size=2048",
    "distill.micro_batch_size=1", "data.sequence_length=8192", "distill.recompute=true",
]  # fmt: skip


def plans() -> dict[int, dict[str, tuple[Plan, float]]]:
    """By GPUs and by how many share a model: the plan, and the seconds of its links in a step."""
    found: dict[int, dict[str, tuple[Plan, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        for gpus in GPUS:
            found[gpus] = {}
            for name, share in SHARED.items():
                if share and share > gpus:
                    continue
                given = [
                    f"teacher.path={folder}",
                    f"cluster.num_nodes={gpus // 8}",
                    f"cluster.shard_ranks={share or gpus}",
                ]
                config = load_config(*SETTINGS, *given)
                made = make_plan(config)
                seconds = link_seconds(config, made.collectives, made.layout)
                assert seconds is not None, "conf/cluster/h100.yaml says how fast the links are"
                found[gpus][name] = made, seconds
    return found


def table(found: dict[int, dict[str, tuple[Plan, float]]]) -> str:
    """Markdown: of each number of GPUs the computing of a step, and of each layout memory, traffic and its time."""
    names = [f"shared by {name}" for name in SHARED]
    lines = [
        "| GPUs | computing, s | " + " | ".join(f"{name}: memory, GiB | sent, GiB | links, s" for name in names) + " |",
        "|" + "---:|" * (2 + 3 * len(names)),
    ]
    for gpus, layouts in found.items():
        [computing] = {made.step_seconds for made, _ in layouts.values()}
        cells = [f"{gpus:,}", f"{computing:.2f}"]
        for name in SHARED:
            if name not in layouts:
                cells += [""] * 3
                continue
            made, seconds = layouts[name]
            sent = sum(one.sent for one in made.collectives)
            cells += [f"{made.peak[1] / 2**30:.1f}", f"{sent / 2**30:,.1f}", f"{seconds:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[int, dict[str, tuple[Plan, float]]], to: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "compress"  # the same file each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    computing = [next(iter(layouts.values()))[0].step_seconds for layouts in found.values()]
    axes.plot(list(found), computing, color="black", linewidth=2, label="computing")
    for name, marker in zip(SHARED, "os^", strict=True):
        of = [gpus for gpus in found if name in found[gpus]]
        axes.plot(of, [found[gpus][name][1] for gpus in of], marker=marker, label=f"links, a model shared by {name}")
    axes.set(xscale="log", yscale="log", xlabel="H100 GPUs, eight a node", ylabel="seconds a step")
    axes.set_xticks(list(found), [f"{gpus:,}" for gpus in found])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(to, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of cluster.md")
    options = parser.parse_args()
    found = plans()
    page = options.docs / "cluster.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} lacks the line {BEGIN!r} or {END!r} after it, between which the table goes")
    page.write_text(before + BEGIN + "\n" + table(found) + "\n" + END + after)
    plot(found, options.docs / "communication.svg")
    print(f"written: {page}, {options.docs / 'communication.svg'}")


if __name__ == "__main__":
    main()
