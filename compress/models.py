"""Loading models and tokenizers from Hugging Face folders, strictly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compress.artifacts import remedy_for
from compress.errors import ArtifactError, ConfigError
from compress.routing import in_float32

GENERATION = "generation_config.json"
T = TypeVar("T")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class OutputHead:
    """What turns final hidden states into logits: the weight (V, D), and what the family puts upon its product."""

    weight_VD: Tensor
    softcap: float | None = None  # c of c * tanh(logits / c), as Gemma 2's
    bias_V: Tensor | None = None
    scale: float = 1.0

    def rows(self, count: int) -> OutputHead:
        """Its first rows: what a vocabulary has without padding."""
        if count == len(self.weight_VD):
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:count]
        return OutputHead(self.weight_VD[:count], self.softcap, bias_V, self.scale)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's head, with the scale of Cohere (logit_scale) and Granite (logits_scaling, which divides)."""
    config, linear = model.config, model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return OutputHead(linear.weight, None if cap is None else float(cap), linear.bias, scale)


def without_padding(*heads: OutputHead) -> list[OutputHead]:
    """The heads' common rows: ids that one of them lacks are no tokens, as `check_vocabulary` proves."""
    rows = min(len(head.weight_VD) for head in heads)
    return [head.rows(rows) for head in heads]


def soft_cap_(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), in place; the logits themselves where there is no cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def logits_of(hidden_CD: Tensor, head: OutputHead, out_CV: Tensor | None = None) -> Tensor:
    """(C, V): the head's product with its bias, scale and soft cap; no gradient flows through the last two."""
    weight_DV = head.weight_VD.T
    if head.bias_V is None:
        logits_CV = torch.mm(hidden_CD, weight_DV, out=out_CV)
    else:
        logits_CV = torch.addmm(head.bias_V, hidden_CD, weight_DV, out=out_CV)
    if head.scale != 1:
        logits_CV *= head.scale
    return soft_cap_(logits_CV, head.softcap)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """In place; unlike model.to(dtype) it leaves the rotary frequencies in float32, as a loaded model has them, and the
    routers of a mixture in float32 with the values of the dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    in_float32(model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever the family calls their parent."""
    layers: Any = model.base_model.layers
    return layers


@contextlib.contextmanager
def only_layers(model: PreTrainedModel, numbers: Sequence[int]) -> Iterator[None]:
    """The model with these of its layers alone, each with the attention it has by its own number, until the block ends.

    transformers looks up the mask, and Gemma 3 the rotary table, by a layer's place: config.layer_types goes along.
    """
    config, layers = model.config, decoder_layers(model)
    count, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    try:
        model.base_model.layers = nn.ModuleList([layers[number] for number in numbers])  # type: ignore[assignment]
        config.num_hidden_layers = len(numbers)
        if types is not None:
            config.layer_types = [types[number] for number in numbers]
        yield
    finally:
        model.base_model.layers = layers  # type: ignore[assignment]
        config.num_hidden_layers = count
        if types is not None:
            config.layer_types = types


def load_model(folder: Path | str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a folder; every tensor found, none left over, none of another size. The routers of
    a mixture compute in float32 at least.

    Raises ArtifactError, naming the tensors, where transformers would only warn and go on with random weights.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **kernels_for(dtype),
        )
    except Exception as error:  # whatever a damaged config or shard makes transformers stumble over
        raise ArtifactError(
            f"{folder} can't be loaded by transformers ({_reason(error)}); {remedy_for(Path(folder))}"
        ) from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    if wrong:
        raise ArtifactError(
            f"{folder} doesn't fit its own config.json: "
            + "; ".join(f"{key} {names[:3]} ({len(names)} in all)" for key, names in wrong.items())
            + f"; {remedy_for(Path(folder))}"
        )
    in_float32(model)
    return model


def kernels_for(dtype: torch.dtype) -> dict[str, str]:
    """What transformers is told to compute by: the grouped kernels of mixtures know no float64, which proofs use."""
    return {"experts_implementation": "eager"} if dtype == torch.float64 else {}


def empty_model(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder's config.json on the meta device, in eval mode: no tensor of it has memory or a value.

    Raises ArtifactError for a config that transformers can't build a model from.
    """

    def make() -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **kernels_for(dtype)
            )
        in_float32(model)
        return model.eval()

    return _loaded(folder / "config.json", make)


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises ArtifactError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file makes transformers and tokenizers stumble over
        raise ArtifactError(
            f"{folder} has no usable tokenizer ({_reason(error)}); {remedy_for(Path(folder))}"
        ) from error


def _reason(error: Exception) -> str:
    """An error of another library in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def check_usable(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise before any long work for what only shows later: a config that transformers can't build a model from, a
    generation config that it refuses, a tokenizer whose ids the embedding lacks. Reads no weights.
    """
    config = _loaded(
        folder / "config.json", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )
    with torch.device("meta"):
        _loaded(
            folder / "config.json",
            lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code),
        )
    if (folder / GENERATION).is_file():
        found = _loaded(folder / GENERATION, lambda: GenerationConfig.from_pretrained(folder))
        _loaded(folder / GENERATION, found.validate)
        ends = found.eos_token_id
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
            raise ArtifactError(
                f"{folder / GENERATION}: eos_token_id={ends!r} must be a number or a list of numbers; correct it"
            )
    tokenizer = load_tokenizer(folder, trust_remote_code)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer gives ids up to {largest}, but config.json says vocab_size={config.vocab_size}, "
            "so there is no embedding for them; use the tokenizer files that belong to the weights, or resize the "
            "embedding (resize_token_embeddings) and save the model with both"
        )


def _loaded(file: Path, make: Callable[[], T]) -> T:
    try:
        return make()
    except Exception as error:  # KeyError, TypeError, ... : transformers' own classes don't cover it
        raise ArtifactError(
            f"{file}: transformers refuses it ({_reason(error)}); correct it, or fetch it again"
        ) from error


def check_vocabulary(teacher: Path, student: Path, trust_remote_code: bool = False) -> None:
    """Raise ConfigError unless heads of different sizes differ by padding alone: no token has an id beyond the smaller.

    The two must have the same tokenizer (`check_same_tokenizer`).
    """
    sizes = {folder: int(_vocabulary_of(folder, trust_remote_code)) for folder in (teacher, student)}
    rows = min(sizes.values())
    if len(set(sizes.values())) == 1:
        return
    largest = max(load_tokenizer(teacher, trust_remote_code).get_vocab().values())
    if largest >= rows:
        raise ConfigError(
            f"vocab_size of student {student} is {sizes[student]}, of teacher {teacher} {sizes[teacher]}, and the "
            f"tokenizer has ids up to {largest}: rows beyond {rows} aren't padding, and logits are compared id by id; "
            "give both the same vocabulary (resize_token_embeddings)"
        )


def _vocabulary_of(folder: Path, trust_remote_code: bool) -> int:
    config = _loaded(
        folder / "config.json", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )
    return int(config.vocab_size)


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
