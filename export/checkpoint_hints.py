"""What a directory that is no checkpoint of ours seems to be, and what to do with it: for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_OTHER_FORMATS = {
    ".gguf": "a GGUF file", ".pth": "Meta's own format", ".msgpack": "weights of Flax", ".h5": "weights of TensorFlow",
}  # fmt: skip
_QUANTIZED = (".qweight", ".qzeros", ".SCB", ".absmax", ".weight_scale", ".weight_packed")
_EMBEDDING = "model.embed_tokens.weight"
_ADAPTER = "adapter_config.json"
_NAMED = ("config.json", "model.safetensors.index.json", "model.safetensors")


def checkpoint_name(directory: Path) -> str:
    """Name of a checkpoint for people: its directory's, or in Hugging Face's cache the model's."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots" and directory.parents[1].name.startswith("models--"):
        return directory.parents[1].name.removeprefix("models--").replace("--", "/")
    return directory.name


def what_is_there(directory: Path) -> str:
    """What to do about a directory in which the files of a checkpoint were not found; empty where nothing is known."""
    snapshots = sorted(path.parent for path in directory.glob("snapshots/*/config.json"))
    if snapshots:
        return f"it is a model in Hugging Face's cache: give its snapshot {snapshots[-1]}"
    dangling = [name for name in _NAMED if (directory / name).is_symlink() and not (directory / name).exists()]
    if dangling:
        return f"its {dangling[0]} is a link to a file that is gone; fetch the checkpoint again"
    if (directory / _ADAPTER).is_file():
        return "it holds an adapter (LoRA): merge it into its base model and save that (peft: merge_and_unload)"
    if any(directory.glob("*-of-*.safetensors")) or any(directory.glob("*-of-*.bin")):
        return "it holds shards of weights without their .index.json; fetch the whole checkpoint"
    for path in sorted(directory.glob("*")):
        if path.suffix in _OTHER_FORMATS:
            return f"{path.name} is {_OTHER_FORMATS[path.suffix]}; convert it to safetensors in the Hugging Face layout"
    named = sorted(directory.glob("model.*.safetensors"))
    return f"rename {named[0].name} to model.safetensors if that is the variant to build" if named else ""


def names_hint(tensors: Iterable[str]) -> str:
    """A note where the names of tensors are those of a quantised checkpoint, or of a model in another place."""
    names = list(tensors)
    for name in names:
        if name.endswith(_EMBEDDING) and name != _EMBEDDING:
            wrapped = name.removesuffix(_EMBEDDING)
            return (
                f" (its names begin with {wrapped!r}: save the model itself, not what was wrapped around it to train)"
            )
        if name == _EMBEDDING.removeprefix("model."):
            return " (its names lack 'model.': save the model with its lm_head, not the decoder inside it)"
    return _quantized_hint(names)


def _quantized_hint(tensors: Iterable[str]) -> str:
    """A note where the names of tensors are those of a quantised checkpoint."""
    if any(name.endswith(_QUANTIZED) for name in tensors):
        return " (its tensors are quantised already; give the float checkpoint and quantise in the build)"
    return ""
