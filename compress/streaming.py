"""One decoder layer of a checkpoint at a time: scoring, compensation and proof for models larger than memory, and the
start of a training whose ranks share a model that none of them could hold.

Each layer is read from the shards into a model of that one layer (transformers' own class and loader, so masks, rotary
tables and fused experts are as in the whole). For scoring the calibration text's hidden states pass through it, and it
is freed: what is held is one layer, one batch of activations, and the hidden states, in memory or in a file. For
training its tensors move into the whole model, to be sharded at once.
"""

# B sequences of a batch, S sequences of all batches, T tokens, D hidden, V vocabulary, N picked tokens

from __future__ import annotations

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.architecture import ModelInfo, config_layer_types, layer_of, renumber
from compress.artifacts import open_tensors, save_tensors
from compress.devices import CPU
from compress.errors import ArtifactError
from compress.folders import read_model
from compress.models import decoder_layers, empty_model, kernels_for, load_model, soft_cap_
from compress.routing import in_float32
from compress.slicing import largest_layer_bytes
from compress.step import packed_masks
from compress.tokens import TokenBatch

_TINY_VOCABULARY = 8  # the one-layer models have an embedding that nobody asks
_SMALL_BYTES = 1 << 24
_ROWS = 2048  # of the output head in a product
Progress = Callable[[Iterator[Any], int], Iterable[Any]]


class LayerStream:
    """The layers of a checkpoint folder, one by one; `like`: in the class and by the config of this model, which may be
    a folder's own code, instead of transformers' for its model_type. On `device`."""

    def __init__(
        self,
        info: ModelInfo,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        like: PreTrainedModel | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.info, self.dtype, self.trust, self.device = info, dtype, trust_remote_code, device
        self._config = info.parsed if like is None else like.config
        self._class: Any = AutoModelForCausalLM._model_mapping[type(self._config)] if like is None else type(like)
        self.num_layers = info.shape.num_hidden_layers
        self._shards = info.shards
        self._layer_bytes = largest_layer_bytes(info)
        self._types = config_layer_types(info.parsed)
        # The last norm's tensors, copied: mapping their shard for each layer would map the embedding beside it too.
        vocabulary = (info.family.embedding, info.family.head)
        outside = [name for name in info.tensors if layer_of(name) is None and name not in vocabulary]
        self._outside = {name: self.tensor(name).clone() for name in outside}
        self._names: list[list[str]] = [[] for _ in range(self.num_layers)]
        for name in info.tensors:
            layer = layer_of(name)
            if layer is not None:
                self._names[layer].append(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint as it is stored, mapped from its shard."""
        return self._shards.get(name)

    def layer(self, number: int) -> PreTrainedModel:
        """A model of this layer alone, frozen and in eval mode, with the whole model's last norm behind it.

        Raises ArtifactError when transformers doesn't find all of the layer's tensors, or finds others.
        """
        config = copy.deepcopy(self._config)
        config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 1, _TINY_VOCABULARY, False
        if self._types is not None:
            config.layer_types = [self._types[number]]
        state = {renumber(name, 0, None): self.tensor(name) for name in self._names[number]}
        return self._load(config, state | self._outside, f"layer {number}")

    def _load(self, config: Any, state: dict[str, Tensor], what: str) -> PreTrainedModel:
        loaded: Any = self._class.from_pretrained(
            None, config=config, state_dict=state, dtype=self.dtype, output_loading_info=True, **kernels_for(self.dtype)
        )
        model: PreTrainedModel = loaded[0]
        facts: dict[str, Any] = loaded[1]
        absent = set(facts["missing_keys"])
        if config.vocab_size == _TINY_VOCABULARY:
            vocabulary = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
            absent -= {name for name, parameter in model.named_parameters() if any(parameter is w for w in vocabulary)}
        wrong = [*sorted(absent), *map(str, facts["unexpected_keys"]), *map(str, facts["mismatched_keys"])]
        if wrong:
            raise ArtifactError(f"{self.info.folder}: {what} doesn't load: {wrong[:3]}; fetch or make it again")
        in_float32(model)
        nn.Module.to(model, self.device)
        return model.eval().requires_grad_(False)

    def fill(self, model: PreTrainedModel, number: int | None) -> None:
        """Give an `empty_model` of this checkpoint the weights of a layer; None: of all that is outside of the layers,
        with the tables that no checkpoint holds (rotary frequencies)."""
        with torch.random.fork_rng(devices=[]):  # transformers draws weights for the tiny embedding
            if number is not None:
                _move(decoder_layers(self.layer(number))[0], decoder_layers(model)[number])
                return
            config = copy.deepcopy(self._config)
            config.num_hidden_layers = 0
            names = [name for name in self.info.tensors if layer_of(name) is None]
            outside = self._load(config, {n: self.tensor(n) for n in names}, "what is outside of layers")
            _move(outside, model)

    def let_go(self) -> None:
        """Free the last layer before the next one comes: models hold themselves in cycles. Small ones may wait."""
        if self._layer_bytes > _SMALL_BYTES:
            gc.collect()

    def embed(self, model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
        """The embedding's output (B, T, D), reading only the rows that are asked for; `model` is any of the layers'."""
        rows = self.tensor(self.info.family.embedding)
        used, place = ids_BT.flatten().cpu().unique(return_inverse=True)
        hidden_BTD = rows[used].to(self.dtype)[place].unflatten(0, tuple(ids_BT.shape)).to(self.device)
        scale = getattr(model.get_input_embeddings(), "embed_scale", None)
        return hidden_BTD if scale is None else hidden_BTD * torch.as_tensor(scale).to(self.dtype)

    def head_logits(self, final_ND: Tensor) -> Iterator[Tensor]:
        """(N, R) in float32 for one block of the vocabulary's rows after the other: together they may be large.

        The shard is let go at the end.
        """
        family = self.info.family
        weight_VD = self.tensor(family.embedding if self.info.shape.tied else family.head)
        cap = getattr(self.info.parsed, "final_logit_softcapping", None)
        for rows_RD in weight_VD.split(_ROWS):
            yield soft_cap_(final_ND @ rows_RD.to(final_ND.dtype).T, cap).float()
        self._shards.close()


def streamed_model(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, device: torch.device = CPU
) -> tuple[PreTrainedModel, Callable[[int | None], None]]:
    """What `load_model` loads, yet without weights, and what gives a layer its own, by its number, or, by None and as
    the last, all that is outside of the layers, on the device; bit for bit the same. For `parallel.shard` and
    `shard_frozen`.

    Raises ArtifactError, naming the tensors, for a folder that doesn't hold what its config.json describes.
    """
    model = empty_model(folder, dtype, trust_remote_code)
    stream = LayerStream(read_model(folder, trust_remote_code), dtype, trust_remote_code, model, device)
    return model, lambda number: stream.fill(model, number)


def load_on(device: torch.device, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """`load_model`, on a device, frozen and in eval mode; whole in its memory only. Raises ArtifactError."""
    if device.type == "cpu":
        return load_model(folder, dtype, trust_remote_code).eval().requires_grad_(False)
    model, fill = streamed_model(folder, dtype, trust_remote_code, device)
    for number in (*range(len(decoder_layers(model))), None):
        fill(number)
    return model.requires_grad_(False)


def _move(source: nn.Module, target: nn.Module) -> None:
    """Every parameter and buffer of a module into the place of its name in another. The source, which may live on in a
    cycle, lets them go; tied ones stay tied."""
    parts = [*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)]
    for name, tensor in parts:
        place, _, leaf = name.rpartition(".")
        empty = getattr(target.get_submodule(place), leaf)
        assert empty.is_meta, name
        assert empty.shape == tensor.shape, name
        setattr(target.get_submodule(place), leaf, tensor.requires_grad_(empty.requires_grad))
        delattr(source.get_submodule(place), leaf)


def through_layer(model: PreTrainedModel, hidden_BTD: Tensor, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(the layer's output, the same behind the model's last norm), packed documents isolated."""
    seen: list[Tensor] = []

    def take(_module: Any, _arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[0].register_forward_hook(take)
    try:
        output = model.base_model(
            inputs_embeds=hidden_BTD,
            position_ids=position_ids_BT,
            attention_mask=packed_masks(model, position_ids_BT),
            use_cache=False,
        )
    finally:
        handle.remove()
    return seen[0], output.last_hidden_state


class States:
    """Hidden states of every batch between two layers; in memory, or in a file where a folder for it is given."""

    def __init__(self, batches: Sequence[TokenBatch], hidden_size: int, dtype: torch.dtype, spill: Path | None) -> None:
        self.batches = batches
        self.path = None if spill is None else spill / "hidden.bin"
        counts = [batch.input_ids.numel() * hidden_size for batch in batches]
        if self.path is None:
            whole = torch.empty(sum(counts), dtype=dtype)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._reserve(sum(counts) * dtype.itemsize)
            whole = torch.from_file(str(self.path), shared=True, size=sum(counts), dtype=dtype)
        shapes = [(*batch.input_ids.shape, hidden_size) for batch in batches]
        self.of = [part.view(shape) for part, shape in zip(whole.split(counts), shapes, strict=True)]

    def _reserve(self, needed: int) -> None:
        """Take the disk now: a mapping of a sparse file would kill the process when the disk is full later."""
        assert self.path is not None
        try:
            with open(self.path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, needed))
        except OSError as error:
            self.path.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            raise ArtifactError(
                f"{self.path}: the calibration text's hidden states take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                f"are free ({error.strerror}); lower score.num_sequences, or set run_dir= to a larger disk"
            ) from error

    def close(self) -> None:
        self.of = []
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@torch.no_grad()
def sweep(
    stream: LayerStream,
    batches: Sequence[TokenBatch],
    layers: Sequence[int],
    visit: Callable[[PreTrainedModel, int], Callable[[], None]],
    before: Callable[[TokenBatch], None] = lambda batch: None,
    *,
    spill: Path | None = None,
    progress: Progress = lambda steps, total: steps,
) -> None:
    """Pass the batches through `layers` in their order, as a model of these layers would be.

    `visit(model, number)` is called when a layer is loaded, to attach its hooks, and what it returns when all batches
    have passed. `before` is called before each batch of each layer.
    """
    states = States(batches, stream.info.shape.hidden_size, stream.dtype, spill)

    def steps() -> Iterator[TokenBatch]:
        for place, number in enumerate(layers):
            with torch.no_grad():  # a generator's body runs in its caller's mode
                model = stream.layer(number)
                leave = visit(model, number)
                for batch, slot_BTD in zip(batches, states.of, strict=True):
                    before(batch)
                    hidden_BTD = stream.embed(model, batch.input_ids) if place == 0 else slot_BTD.to(stream.device)
                    slot_BTD.copy_(through_layer(model, hidden_BTD, batch.position_ids)[0])
                    yield batch
                leave()
                del model, leave
                stream.let_go()

    try:
        for _ in progress(steps(), len(layers) * len(batches)):
            pass
    finally:
        states.close()


class TensorFolder(Mapping[str, Tensor]):
    """Tensors written one by one into files of their own and read back when asked for; for what doesn't fit at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        path = self.folder / f"{len(self._files):05d}.safetensors"
        save_tensors(path, {"tensor": tensor.contiguous()})
        self._files[name] = path

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = open_tensors(self._files[name]).get_tensor("tensor")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
