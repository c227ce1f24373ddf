"""Model folders: finding the teacher's, and checking one against the axis table by its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig

from compress.architecture import ModelInfo, TensorInfo, check_described, parse_config, shape_of, tensor_shapes
from compress.artifacts import fingerprint, fingerprint_path, open_tensors, read_json
from compress.embedded import resolve
from compress.errors import ArchitectureError, ArtifactError
from compress.families import Family, family_of

# Recomputed by every transformers since 4.32; early Llama and GPT-NeoX checkpoints still carry them.
IGNORED = re.compile(r".*\.layers\.\d+\.(self_attn|attention)\.(rotary_emb\.inv_freq|bias|masked_bias)")
FLOATS = ("F64", "F32", "F16", "BF16")
# What a snapshot needs. Not *.bin (pickle), not consolidated.safetensors (the weights again, in another naming).
HUB_FILES = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def teacher_folder(
    path: str, revision: str | None, cache_dir: Path, trust_remote_code: bool = False, config_only: bool = False
) -> Path:
    """The local folder of a teacher: `embedded:NAME`, a folder, or a hub id (fetched into the hub's own cache).

    With `config_only` no more than config.json is fetched.

    Raises ArtifactError when it is none of them or the hub can't be reached and the cache doesn't have it.
    """
    folder = Path(resolve(path, cache_dir)).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ArtifactError(f"teacher.path={path} is a file; give the folder that holds config.json and *.safetensors")
    if path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        raise ArtifactError(
            f"teacher.path={path} does not exist; give a Hugging Face folder, a hub id, or embedded:NAME"
        )
    from huggingface_hub import snapshot_download

    wanted = ["config.json"] if config_only else HUB_FILES
    patterns = [*wanted, "*.py"] if trust_remote_code else wanted
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's own classes, httpx's, and OSError: all mean that there is no snapshot
        at = f" at revision {revision}" if revision else ""
        raise ArtifactError(
            f"teacher.path={path} is no local folder, and as a hub id{at} it could not be fetched "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Check the spelling and the network; "
            "for a gated model log in with `hf auth login`; offline, give the path of a folder"
        ) from error


def weights_fingerprint(folder: Path) -> str:
    """Of what a model computes: its config.json and its shards."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return fingerprint([[file.name, fingerprint_path(file)] for file in files])


def tokenizer_fingerprint(folder: Path) -> str:
    patterns = ["tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model"]
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return fingerprint([[file.name, fingerprint_path(file)] for file in files])


def read_model(folder: Path, trust_remote_code: bool = False) -> ModelInfo:
    """Check a Hugging Face folder against the table by its config.json and the headers of its shards only.

    Raises ArtifactError for what is missing, truncated or foreign, ArchitectureError for what the table can't describe.
    """
    info = read_config(folder, trust_remote_code)
    tensors = _read_headers(folder)
    if info.shape.tied and info.family.head in tensors:
        _check_same_head(folder, tensors, info.family)
        del tensors[info.family.head]
    _check_tensors(folder, tensors, tensor_shapes(info.rows, info.shape))
    return replace(info, tensors=tensors)


def read_config(folder: Path, trust_remote_code: bool = False) -> ModelInfo:
    """What config.json alone says: everything but the tensors. Raises as `read_model` does."""
    if not (folder / "config.json").is_file():
        hint = (
            "merge the adapter into its base model first"
            if (folder / "adapter_config.json").exists()
            else ("it must be a folder that transformers' save_pretrained wrote")
        )
        raise ArtifactError(f"{folder} holds no config.json; {hint}")
    config = read_json(folder / "config.json")
    source = str(folder / "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{source} must hold a JSON object, not {type(config).__name__}; fetch it again")
    if config.get("auto_map") and not trust_remote_code:
        raise ArchitectureError(
            f"{source}: auto_map names Python code to be run; nothing of it was. "
            "If you trust the model's author, set teacher.trust_remote_code=true"
        )
    family = family_of(config, source)
    if config.get("quantization_config"):
        quantization = config["quantization_config"]
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ArchitectureError(
            f"{source}: the checkpoint is quantised ({method}); rows of packed weights can't be selected. "
            "Use the bfloat16 original as teacher and quantise the student"
        )
    if trust_remote_code and dict(config.get("auto_map") or {}).get("AutoConfig"):
        _register_config_class(folder, family)
    parsed = parse_config(config, source)
    check_described(family, parsed, source)
    shape = shape_of(parsed)
    for name, value in asdict(shape).items():
        if name != "tied" and value < 1 and family.field(name) is not None:
            raise ArchitectureError(f"{source}: {family.field(name)}={value} must be at least 1")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ArchitectureError(
            f"{source}: num_attention_heads={shape.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={shape.num_key_value_heads}"
        )
    return ModelInfo(folder, config, family, shape, {})


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Shard file -> the tensors that the index promises in it; None where there is no index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ArtifactError(f"{index} has no weight_map; fetch the model again")
        shards: dict[str, list[str] | None] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ArtifactError(f"{index}: {name} lies in {shard!r}, which is no .safetensors file of this folder")
            promised = shards.setdefault(shard, [])
            assert promised is not None
            promised.append(name)
        if single.is_file() and single.name not in shards:
            raise ArtifactError(f"{folder} holds both {single.name} and {index.name}; delete the one that is stale")
        return shards
    if single.is_file():
        return {single.name: None}
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ArtifactError(
            f"{folder} holds its weights as {pickles[0]}, a pickle, which can run code when read and isn't read here. "
            "Use a revision with .safetensors, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise ArtifactError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json; fetch it again")


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard, promised in _shards(folder).items():
        with open_tensors(folder / shard) as reader:
            names = set(reader.keys())
            if promised is not None and names != set(promised):
                odd = sorted(names ^ set(promised))
                raise ArtifactError(
                    f"{folder / shard} and the index disagree on {len(odd)} tensors, such as {odd[0]}: "
                    "the shard is from another model or version; fetch the folder again"
                )
            for name in names:
                part = reader.get_slice(name)
                info = TensorInfo(shard, tuple(part.get_shape()), part.get_dtype())
                if IGNORED.fullmatch(name):
                    continue
                if info.dtype not in FLOATS:
                    raise ArchitectureError(
                        f"{folder / shard}: {name} is {info.dtype}, one of {', '.join(FLOATS)} is needed; "
                        "use the unquantised original as teacher"
                    )
                tensors[name] = info
    return tensors


def _check_same_head(folder: Path, tensors: Mapping[str, TensorInfo], family: Family) -> None:
    """A tied config with a stored head is fine when it is the embedding; else transformers and vLLM would disagree."""
    embedding, head = family.embedding, family.head
    if embedding in tensors:
        with (
            open_tensors(folder / tensors[embedding].shard) as first,
            open_tensors(folder / tensors[head].shard) as second,
        ):
            one, other = first.get_tensor(embedding), second.get_tensor(head)
            if one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all()):
                return
    raise ArchitectureError(
        f"{folder}: config.json says tie_word_embeddings=true, but {head} is stored and isn't {embedding}; "
        "set tie_word_embeddings to false in config.json if the head is right, or delete the tensor if it is not"
    )


def _register_config_class(folder: Path, family: Family) -> None:
    """Let transformers' own mapping know the config class that a trusted folder brings along."""
    if family.model_type not in CONFIG_MAPPING:
        found = type(AutoConfig.from_pretrained(folder, trust_remote_code=True))
        CONFIG_MAPPING.register(family.model_type, found, exist_ok=True)


def _check_tensors(folder: Path, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, unexpected = [n for n in expected if n not in found], sorted(n for n in found if n not in expected)
    wrong = [n for n in expected if n in found and found[n].shape != expected[n]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if unexpected:
        problems.append(f"{len(unexpected)} are unknown, such as {unexpected[0]}")
    if wrong:
        name = wrong[0]
        problems.append(
            f"{len(wrong)} have another size, such as {name}: {found[name].shape}, expected {expected[name]}"
        )
    if problems:
        raise ArtifactError(
            f"{folder}: the weights aren't those that config.json describes: {'; '.join(problems)}. "
            "Fetch the folder again, or check that config.json and the shards are of the same model"
        )
