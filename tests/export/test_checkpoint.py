"""The checkpoint reader: every layout reads alike, every defect is a CheckpointError that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from apar.export.checkpoint import Checkpoint
from apar.export.checkpoint_hints import checkpoint_name
from apar.export.errors import CheckpointError
from apar.export.llama_config import config_from
from apar.export.tensor_files import to_float32

LAYOUTS = ("safetensors", "safetensors-sharded", "bin", "bin-sharded")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in each layout, all of the same numbers."""
    root = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        make_checkpoint(root / layout, "gqa", layout=layout, dtype=torch.bfloat16)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Any:
    """A function that gives a private copy of a layout to damage."""

    def make(layout: str = "safetensors") -> Path:
        return Path(shutil.copytree(originals[layout], tmp_path / layout))

    return make


def edit_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    path.write_text(json.dumps(config))
    return directory


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_all_layouts_hold_the_same(originals: dict[str, Path]) -> None:
    first = Checkpoint.open(originals["safetensors"])
    assert len({t.path for t in Checkpoint.open(originals["bin-sharded"]).tensors.values()}) > 1
    for layout in LAYOUTS:
        other = Checkpoint.open(originals[layout])
        assert other.config == first.config
        assert list(other.tensors) == list(first.tensors)
        for name, tensor in other.tensors.items():
            assert tensor.dtype == "bfloat16"
            whole = tensor.read().view(np.uint16)
            np.testing.assert_array_equal(whole, first.tensors[name].read().view(np.uint16))
            np.testing.assert_array_equal(whole, tensor.map().view(np.uint16))
            np.testing.assert_array_equal(whole[3:9], tensor.read(3, 9).view(np.uint16))


def test_numbers_are_the_models(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = make_checkpoint(tmp_path / str(dtype), dtype=dtype)
        state = model.state_dict()
        for name, tensor in Checkpoint.open(tmp_path / str(dtype)).tensors.items():
            np.testing.assert_array_equal(to_float32(tensor.read()), state[name].numpy())


def test_config_is_read(originals: dict[str, Path], copy: Any) -> None:
    config = Checkpoint.open(originals["safetensors"]).config
    decoder = config.decoder
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim, decoder.qkv_size) == (4, 2, 16, 128)
    assert (decoder.rms_norm_eps, decoder.max_context) == (1e-5, 256)
    assert (config.eos, config.bos, config.pad) == ((2,), 1, 0)
    directory = edit_config(copy(), eos_token_id=[2, 7], pad_token_id=-1)
    (directory / "generation_config.json").write_text('{"eos_token_id": [9, 2], "pad_token_id": 4}')
    config = Checkpoint.open(directory).config
    assert (config.eos, config.pad) == ((9, 2, 7), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; APAR builds llama, mistral, qwen2"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"model_type": "mistral"}, "LlamaForCausalLM is not supported for model_type 'mistral'"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": "x"}, "sliding_window must be a positive"),
        ({"model_type": "qwen2", "architectures": None}, r"lacks tensors.*q_proj\.bias"),
        ({"model_type": None, "architectures": None}, "model_type None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            r"/config\.json: RoPE scaling of type 'longrope' is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised already \(awq\)"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be a positive integer, not 'two'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "64 is no multiple of"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a small positive number"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id"),
        ({"eos_token_id": 264}, "eos_token_id 264 is not below vocab_size 264"),
        ({"quantization_config": "awq"}, r"quantised already \(awq\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised already \(unknown method\)"),
        ({"quantization_config": ["awq"]}, r"quantised already \(\['awq'\]\)"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ({"architectures": 5}, "architectures must be a list of names"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, which no Llama has"),
        ({"num_hidden_layers": 10**6}, "holds 21 tensors, too few for the 1000000 layers"),
        ({"head_dim": 10**9}, "head_dim is 1000000000, which no Llama has"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "supported are default, linear, dynamic, llama3, yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kind of layer are not supported"),
        ({"rope_parameters": {"rope_theta": "x"}}, "needs a positive number 'rope_theta', not 'x'"),
        ({"rope_parameters": {"rope_theta": 0}}, "needs a positive number 'rope_theta', not 0"),
        ({"rope_parameters": {"rope_theta": 1.0}}, r"rope_theta must be above 1, not 1\.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "needs a positive number 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e-40}}, "gives no finite frequencies"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "needs a positive number 'factor', not 'x'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": [1]}}, "positive number 'beta_fast'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": "x"}}, "'attention_factor'"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "needs a positive number 'factor', not None"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, r"lacks tensors .*model\.layers\.2\.input_layernorm.* and 4 more"),
        ({"num_hidden_layers": 1}, r"does not account for: model\.layers\.1\."),
        ({"attention_bias": True}, r"lacks tensors.*q_proj\.bias"),
        ({"vocab_size": 300}, r"embed_tokens\.weight has shape \[264, 64\], config.json asks for \[300, 64\]"),
    ],
)
def test_config_errors(copy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(edit_config(copy(), **changes))


def test_directory_errors(copy: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json; give the directory"):
        Checkpoint.open(tmp_path)
    directory = copy()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: none of model\.safetensors, "):
        Checkpoint.open(directory)
    (directory / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, not list"):
        Checkpoint.open(directory)
    (directory / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(directory)


def test_what_is_there_instead(copy: Any, tmp_path: Path) -> None:
    """A directory of another kind is named as what it is, with what to do about it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no config\.json; it holds an adapter \(LoRA\): merge it"):
        Checkpoint.open(adapter)
    for layout in ("safetensors-sharded", "bin-sharded"):
        directory = copy(layout)
        next(directory.glob("*.index.json")).unlink()
        with pytest.raises(CheckpointError, match=r"shards of weights without their \.index\.json"):
            Checkpoint.open(directory)
    directory = copy()
    weights = directory / "model.safetensors"
    for name, message in (
        ("model.Q4_K_M.gguf", "model.Q4_K_M.gguf is a GGUF file; convert it"),
        ("consolidated.00.pth", "is Meta's own format; convert it"),
        ("model.fp16.safetensors", r"rename model\.fp16\.safetensors to model\.safetensors"),
    ):
        weights = weights.rename(directory / name)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(directory)


def test_hugging_face_cache(copy: Any, tmp_path: Path) -> None:
    """Snapshots of the cache are links to blobs; the model's own directory above them holds none of its files."""
    model = tmp_path / "models--THUDM--APAR-7B"
    snapshot = model / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    blobs = copy().rename(model / "blobs")
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert Checkpoint.open(snapshot).decoder.hidden_size == 64
    assert checkpoint_name(snapshot) == "THUDM/APAR-7B"
    assert checkpoint_name(blobs) == "blobs"
    with pytest.raises(CheckpointError, match=f"cache: give its snapshot {snapshot}"):
        Checkpoint.open(model)
    (blobs / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"its config\.json is a link to a file that is gone"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"base_model.model.{name}", r"its names begin with 'base_model\.model\.': save the model itself"),
        (lambda name: name.removeprefix("model."), r"its names lack 'model\.': save the model with its lm_head"),
    ],
)
def test_names_of_a_model_in_another_place(copy: Any, rename: Any, message: str) -> None:
    path = copy() / "model.safetensors"
    header, data = header_of(path)
    write_header(path, {rename(name) if name != "__metadata__" else name: at for name, at in header.items()}, data)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path.parent)


def test_quantised_tensors_are_named(copy: Any) -> None:
    path = copy() / "model.safetensors"
    header, data = header_of(path)
    header["model.layers.0.mlp.up_proj.qweight"] = header.pop("model.layers.0.mlp.up_proj.weight")
    write_header(path, header, data)
    with pytest.raises(CheckpointError, match=r"lacks tensors .*up_proj\.weight \(its tensors are quantised already"):
        Checkpoint.open(path.parent)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated or no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated or no safetensors file"),
        (struct.pack("<Q", 4) + b"{abc", "damaged safetensors header"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "damaged safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "it holds no object"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "damaged safetensors header"),
        (struct.pack("<Q", 20) + b"[" * 20, "damaged safetensors header"),
    ],
)
def test_garbage_headers(copy: Any, raw: bytes, message: str) -> None:
    directory = copy()
    (directory / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F13"}, "unknown element type 'F13'"),
        ({"shape": [-64]}, "natural numbers"),
        ({"shape": [65]}, r"tensor model\.norm\.weight of shape \[65\] lies at"),
        ({"shape": "64"}, "damaged safetensors header"),
        ({"data_offsets": [-2, 126]}, "natural numbers"),
        ({"data_offsets": [1 << 40, (1 << 40) + 128]}, "truncated: tensor model.norm.weight ends at byte"),
        ({"data_offsets": [0]}, "damaged safetensors header"),
        ({"dtype": "I16"}, "is int16, which is not supported"),
    ],
)
def test_damaged_entries(copy: Any, change: dict[str, Any], message: str) -> None:
    path = copy() / "model.safetensors"
    header, data = header_of(path)
    header["model.norm.weight"] |= change
    write_header(path, header, data)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path.parent)


def test_truncated_files(copy: Any) -> None:
    for layout, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        path = copy(layout) / name
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=f"{name} is truncated"):
            Checkpoint.open(path.parent)


def test_file_cut_after_opening(copy: Any) -> None:
    path = copy() / "model.safetensors"
    tensor = max(Checkpoint.open(path.parent).tensors.values(), key=lambda t: t.offset)
    os.truncate(path, tensor.offset + 2)
    with pytest.raises(CheckpointError, match=f"ends inside tensor {tensor.name}"):
        tensor.read()


def test_missing_and_surplus_tensors(copy: Any) -> None:
    path = copy() / "model.safetensors"
    header, data = header_of(path)
    spare = header.pop("lm_head.weight")
    write_header(path, header, data)
    with pytest.raises(CheckpointError, match=r'lm_head\.weight \(.*"tie_word_embeddings": true'):
        Checkpoint.open(path.parent)
    header |= {"lm_head.weight": spare, "model.layers.0.self_attn.rotary_emb.inv_freq": spare}
    write_header(path, header, data)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in Checkpoint.open(path.parent).tensors
    header["model.layers.0.self_attn.q_proj.bias"] = spare
    write_header(path, header, data)
    with pytest.raises(CheckpointError, match=r"does not account for: .*q_proj\.bias; check .*attention_bias"):
        Checkpoint.open(path.parent)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"model_type": "llama", "sliding_window": 48}, 256),
        ({"model_type": "mistral", "sliding_window": None}, 256),
        ({"model_type": "mistral"}, 256),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, 4096),
        ({"model_type": "mistral", "sliding_window": 48}, 48),
        ({"model_type": "qwen2", "sliding_window": 48}, 256),
        ({"model_type": "qwen2", "sliding_window": 48, "use_sliding_window": True}, 48),
    ],
)
def test_attention_windows_bound_the_context(originals: dict[str, Path], changes: Any, longest: int) -> None:
    path = originals["safetensors"] / "config.json"
    config = json.loads(path.read_text()) | {"architectures": None} | changes
    read = config_from(config, path, {})
    assert (read.decoder.max_context, read.context_limit) == (longest, longest)


def test_a_tied_lm_head_that_differs_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_checkpoint(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.decoder.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"].read(), model.lm_head.weight.detach().numpy())
    assert "lm_head.weight is there and differs" in caplog.text
    path = tmp_path / "model.safetensors"
    header, data = header_of(path)
    head, embedding = header["lm_head.weight"], header["model.embed_tokens.weight"]
    for same in (embedding, head):  # the same bytes, then a copy of them
        first, last = embedding["data_offsets"]
        begin, end = head["data_offsets"]
        copied = bytearray(data)
        copied[begin:end] = data[first:last]
        write_header(path, header | {"lm_head.weight": same}, bytes(copied))
        caplog.clear()
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.decoder.tie_word_embeddings and "lm_head.weight" not in checkpoint.tensors
        assert not caplog.text


@pytest.mark.parametrize("layout", ["safetensors-sharded", "bin-sharded"])
def test_index_errors(copy: Any, layout: str) -> None:
    directory = copy(layout)
    index = next(directory.glob("*.index.json"))
    data = json.loads(index.read_text())
    names = list(data["weight_map"])
    shard = data["weight_map"][names[0]]
    (directory / shard).rename(directory / "away")
    with pytest.raises(CheckpointError, match=f"names shards that are not there: {shard}; fetch"):
        Checkpoint.open(directory)
    (directory / "away").rename(directory / shard)
    outside = ("../model.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "")
    for bad, message in [(name, "not a plain file name") for name in outside]:
        changed = {"weight_map": data["weight_map"] | {names[0]: bad}}
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(directory)
    index.write_text(json.dumps({"weight_map": data["weight_map"] | {"model.extra.weight": shard}}))
    with pytest.raises(CheckpointError, match=r"lacks tensors that .* promises: model\.extra\.weight"):
        Checkpoint.open(directory)
    for empty in ({}, {"weight_map": {}}, {"weight_map": [1]}):
        index.write_text(json.dumps(empty))
        with pytest.raises(CheckpointError, match="has no weight_map"):
            Checkpoint.open(directory)


def test_each_tensor_is_that_of_the_shard_which_the_index_names(copy: Any) -> None:
    directory = copy("safetensors-sharded")
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.self_attn.q_proj.weight"
    stale = directory / max(set(weight_map.values()) - {weight_map[name]})
    header, data = header_of(stale)
    entry = {"dtype": "BF16", "shape": [64, 64], "data_offsets": [len(data), len(data) + 8192]}
    write_header(stale, header | {name: entry}, data + bytes(8192))
    assert Checkpoint.open(directory).tensors[name].path == directory / weight_map[name]


class Exploit:
    """Unpickled by an ordinary loader, this makes the file it names."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.target,))


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickle_is_refused_and_not_run(copy: Any, tmp_path: Path, protocol: int) -> None:
    path = copy("bin") / "pytorch_model.bin"
    torch.save(OrderedDict(a=Exploit(tmp_path / "pwned")), path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"refused: its pickle asks for (posix|nt)\.mkdir.*nothing was run"):
        Checkpoint.open(path.parent)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", r"asks for builtins\.eval"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.", "its pickle is damaged"),
        (b"\x80\x02}.", "holds 0 tensors, too few for the 2 layers"),
        (b"\x80\x02].", "holds a list, not a state dict"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "entry 'a' is no plain tensor"),
        (b"(S'storage'\ntQ.", "a storage is described wrongly"),
        (b"garbage", "its pickle is damaged"),
    ],
)
def test_odd_pickles(copy: Any, code: bytes, message: str) -> None:
    path = copy("bin") / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path.parent)


def test_odd_torch_files(copy: Any) -> None:
    path = copy("bin") / "pytorch_model.bin"
    state = torch.load(path)
    view = state["lm_head.weight"].T
    torch.save(state | {"lm_head.weight": view.contiguous().T}, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is a strided view"):
        Checkpoint.open(path.parent)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"from before 1\.6"):
        Checkpoint.open(path.parent)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(CheckpointError, match=r"not one of torch\.save"):
        Checkpoint.open(path.parent)
    torch.save(state, path)
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    key = next(name for name in members if name.endswith("/data/0"))
    for changed, compression, message in (
        ({**members, key: members[key][:-2]}, zipfile.ZIP_STORED, "is larger than its storage"),
        ({k: v for k, v in members.items() if k != key}, zipfile.ZIP_STORED, "lacks the storage of tensor"),
        (members, zipfile.ZIP_DEFLATED, "is compressed"),
        ({k: b"big" if "byteorder" in k else v for k, v in members.items()}, zipfile.ZIP_STORED, "big-endian"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path.parent)


def test_parameters_and_views_of_one_storage_are_read(copy: Any) -> None:
    path = copy("bin") / "pytorch_model.bin"
    expected = torch.load(path)
    joined = torch.cat([expected[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    gate, up = joined.split(112)
    state = expected | {
        "model.layers.0.mlp.gate_proj.weight": torch.nn.Parameter(gate),
        "model.layers.0.mlp.up_proj.weight": up,
    }
    state["model.layers.0.mlp.up_proj.weight"] = torch.nn.Parameter(up.clone())
    state["model.layers.0.mlp.up_proj.weight"].of_a_training_script = True
    torch.save(state, path)
    tensors = Checkpoint.open(path.parent).tensors
    for name in ("gate", "up"):
        name = f"model.layers.0.mlp.{name}_proj.weight"
        np.testing.assert_array_equal(to_float32(tensors[name].read()), expected[name].float().numpy())
