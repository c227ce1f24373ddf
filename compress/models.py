"""Loading models and tokenizers from Hugging Face folders, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compress.errors import ArtifactError, ConfigError

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_model(folder: Path | str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a folder; every tensor found, none left over, none of another size.

    Raises ArtifactError, naming the tensors, where transformers would only warn and go on with random weights.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} can't be loaded by transformers: {str(error).splitlines()[0]}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    if wrong:
        raise ArtifactError(
            f"{folder} doesn't fit its own config.json: "
            + "; ".join(f"{key} {names[:3]} ({len(names)} in all)" for key, names in wrong.items())
            + "; fetch or make the folder again"
        )
    return model


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises ArtifactError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def check_same_tokenizer(teacher: Path, student: Path, trust_remote_code: bool = False) -> None:
    """Raise ConfigError unless both folders map the same text to the same ids: logits are compared id by id.

    The vocabularies are compared as maps, not by size: two that only differ in order would train without an error.
    """
    ours, theirs = (load_tokenizer(folder, trust_remote_code) for folder in (student, teacher))
    if ours.get_vocab() != theirs.get_vocab():
        mine, yours = ours.get_vocab(), theirs.get_vocab()
        differing = sorted(t for t in mine.keys() | yours.keys() if mine.get(t) != yours.get(t))
        raise ConfigError(
            f"the tokenizers of teacher ({teacher}) and student ({student}) differ in {len(differing)} tokens, such as "
            f"{differing[0]!r}: id {yours.get(differing[0])} against {mine.get(differing[0])}. Logits are compared id "
            "by id, so both must be the same; copy the teacher's tokenizer only if the student was trained with it"
        )
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"{name} of the tokenizers differs: {getattr(theirs, name)} for teacher {teacher}, "
                f"{getattr(ours, name)} for student {student}; use the teacher's tokenizer files for both"
            )
    probe = "Hello world, 12,345.67 é naïve\tx\n  y"
    if ours(probe)["input_ids"] != theirs(probe)["input_ids"]:
        raise ConfigError(
            f"the tokenizers of teacher {teacher} and student {student} have one vocabulary but split text differently "
            "(merges or normalizer); use the teacher's tokenizer files for both"
        )
