"""Parameters of a served engine and of the models, without a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from apar.export.errors import AparError
from apar.runtime.cli import serve
from apar.runtime.cli.engine_options import scheduler_limits
from apar.runtime.serving.engine import wire
from apar.runtime.serving.engine.settings import NAMES, parse_settings
from apar.runtime.serving.repository import MODELS, read_parameters, repository_source, write_repository


@pytest.fixture(scope="module", autouse=True)
def model_folder() -> Any:
    """The models' own package, found as Triton's stub finds it."""
    folder = str(repository_source() / "apar" / "1")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def test_defaults_are_those_of_the_library() -> None:
    from apar.runtime.limits import SchedulerLimits

    settings = parse_settings(dict.fromkeys(NAMES, " "))
    assert (settings.engine, settings.executor, settings.options) == ("tiny", "auto", {})
    assert settings.limits == SchedulerLimits()


def test_values() -> None:
    settings = parse_settings(
        {
            "engine": "/e",
            "executor": "onnx",
            "executor_options": '{"threads": 2}',
            "device": "cpu",
            "kv_memory_mb": "3",
            "kv_host_memory_mb": "4",
            "max_rows": "600",
            "draft": "ngram",
            "draft_options": '{"num_speculative_tokens": 3}',
            "prefix_caching": "False",
            "max_requests": "7",
            "step_timeout_s": "0",
        }
    )
    assert settings.options == {
        "threads": 2,
        "device": "cpu",
        "kv_memory_bytes": 3 << 20,
        "kv_host_memory_bytes": 4 << 20,
    }
    assert (settings.limits.max_rows, settings.limits.max_step_tokens, settings.limits.max_live_branches) == (
        600,
        1200,
        2400,
    )
    assert not settings.limits.prefix_caching
    assert (settings.draft.method, settings.draft.num_speculative_tokens) == ("ngram", 3)
    assert (settings.max_requests, settings.step_timeout_s) == (7, 0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"max_row": "5"}, "unknown parameter 'max_row'; did you mean max_rows?"),
        ({"colour": "5"}, "unknown parameter 'colour'; known are engine, "),
        ({"num_blocks": "many"}, "num_blocks is 'many'; write a whole number, or nothing for the default"),
        ({"num_blocks": "-4"}, "num_blocks is '-4'"),
        ({"num_blocks": "64", "kv_memory_mb": "5"}, "both size the KV pool; write one of them"),
        ({"host_blocks": "64", "kv_host_memory_mb": "5"}, "both size the host tier; write one of them"),
        ({"max_rows": "0"}, "max_rows must be a whole number from 1 to 65536, not 0"),
        ({"max_rows": "8", "max_step_tokens": "9"}, "must be at least twice max_rows"),
        ({"max_requests": "0"}, "max_requests is 0, so every request would be refused"),
        ({"prefix_caching": "yes"}, "prefix_caching is 'yes'; write true or false"),
        ({"executor_options": "threads=4"}, "executor_options is no JSON"),
        ({"draft": "crystal ball"}, "draft method is 'crystal ball', it must be one of none, medusa, ngram"),
        ({"draft_options": '{"depth": 3}'}, "draft_options has no 'depth'; known are num_speculative_tokens"),
        ({"draft_options": '{"prompt_lookup_max": 99}'}, "prompt_lookup_max is 99"),
        ({"executor_options": "[1]"}, "executor_options must be a JSON object"),
    ],
)
def test_wrong_values(texts: dict[str, str], message: str) -> None:
    with pytest.raises(AparError) as caught:
        parse_settings(texts)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--num-blocks", "7", "--host-blocks", "9"], {"num_blocks": 7, "host_blocks": 9}),
        (
            ["--kv-memory-mb", "5", "--kv-host-memory-mb", "6", "--threads", "2"],
            {"kv_memory_bytes": 5 << 20, "kv_host_memory_bytes": 6 << 20, "threads": 2},
        ),
    ],
)
def test_options_of_apar_serve_reach_the_engine(given: list[str], expected: dict[str, int]) -> None:
    options = serve.make_parser().parse_command(["tiny", *given])
    texts = serve._parameters(options, Path("/engine"), scheduler_limits(options))
    assert parse_settings(texts).options == expected


def test_every_parameter_of_the_shipped_configuration_is_known() -> None:
    from apar_model.settings import OWN_PARAMETERS

    names = set(read_parameters(repository_source() / "apar" / "config.pbtxt"))
    assert names - set(OWN_PARAMETERS) == set(NAMES)
    for model in MODELS[1:]:
        assert set(read_parameters(repository_source() / model / "config.pbtxt")) <= set(OWN_PARAMETERS)


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from apar_model.settings import ModelSettings, ParameterError

    monkeypatch.setenv("SOME_ENGINE", "/engine")
    monkeypatch.setenv("EMPTY", "")

    def settings(name: str = "apar", **parameters: str) -> Any:
        return ModelSettings(name, {key: {"string_value": value} for key, value in parameters.items()})

    found = settings(engine="${SOME_ENGINE}", executor="${EMPTY:-auto}", max_rows="${NOT_SET_ANYWHERE:-}", chat="FALSE")
    assert found.engine == {"engine": "/engine", "executor": "auto", "max_rows": ""}
    assert found.owner and not found.chat and found.exclude_input
    assert settings(FORCE_CPU_ONLY_INPUT_TENSORS="no").engine == {}
    view = settings("ensemble", engine_of="apar", tensors="ids")
    assert not view.owner and view.ids
    for parameters, message in (
        ({"engine": "${NOT_SET_ANYWHERE}"}, "the environment variable NOT_SET_ANYWHERE is not set; set it"),
        ({"engine": "${1}"}, "write a value, "),
        ({"chat": "perhaps"}, "chat is 'perhaps'; write true or false"),
        ({"tensors": "images"}, "tensors is 'images'; write text or ids"),
        ({"startup_timeout_s": "soon"}, "startup_timeout_s is 'soon'"),
        ({"engine_of": "other", "max_rows": "5"}, "max_rows: the model apar has no engine of its own"),
    ):
        with pytest.raises(ParameterError) as caught:
            settings(**parameters)
        assert message in str(caught.value)


def test_written_repository(tmp_path: Path) -> None:
    odd = 'a "quoted" \\ path/ü'
    write_repository(tmp_path / "r", {"engine": odd, "chat": "false"}, models=("apar", "ensemble"))
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["apar", "ensemble"]
    found = read_parameters(tmp_path / "r" / "apar" / "config.pbtxt")
    assert (found["engine"], found["chat"]) == (odd, "false")
    assert read_parameters(tmp_path / "r" / "ensemble" / "config.pbtxt")["chat"] == "false"
    for model in ("apar", "ensemble"):
        assert (tmp_path / "r" / model / "1" / "apar_model" / "engine_link.py").is_file()
        assert not (tmp_path / "r" / model / "1").is_symlink()
    with pytest.raises(AparError, match="is not empty"):
        write_repository(tmp_path / "r")
    with pytest.raises(AparError, match="no model has a parameter colour"):
        write_repository(tmp_path / "s", {"colour": "red"})
    with pytest.raises(AparError, match="models must be some of"):
        write_repository(tmp_path / "s", models=("ensemble",))
    assert not (tmp_path / "s").exists()


def test_both_sides_of_the_wire_understand_each_other() -> None:
    from apar_model import wire as other

    messages = [{"op": "x", "text": "ü\n\U0001f600" * 50}, {"id": 1, "value": 0.1, "list": [None, True]}, {}]
    for ours, theirs in ((wire, other), (other, wire)):
        data = b"".join(ours.encode(message) for message in messages[:1]) + ours.encode(messages[1:])
        for size in (1, 3, 7, len(data)):
            decoder = theirs.Decoder()
            found = [m for at in range(0, len(data), size) for m in decoder.feed(data[at : at + size])]
            assert found == messages


def test_what_a_model_reads_together_is_joined_by_request() -> None:
    from apar_model.wire import join

    said = [
        {"id": 1, "text": "a"},
        {"id": 2, "ids": [1]},
        {"op": "metrics", "gauges": {}},
        {"id": 1, "text": "b"},
        {"id": 2, "ids": [2, 3]},
        {"id": 3, "text": "x", "events": {}},
        {"id": 3, "text": "y"},
        {"id": 1, "text": "c", "final": {}},
        {"id": 3, "text": "z"},
        {"id": 2, "error": ["internal", "x"]},
    ]
    assert join(said) == [
        {"id": 1, "text": "ab"},
        {"id": 2, "ids": [1, 2, 3]},
        {"op": "metrics", "gauges": {}},
        {"id": 3, "text": "x", "events": {}},
        {"id": 3, "text": "yz"},
        {"id": 1, "text": "c", "final": {}},
        {"id": 2, "error": ["internal", "x"]},
    ]


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\x02{]", b"\0\0\0\x03[1]", b"\0\0\0\x011"])
def test_nonsense_on_the_wire(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        list(wire.Decoder().feed(data))
