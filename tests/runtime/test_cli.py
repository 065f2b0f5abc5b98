"""The command line: exit codes, options, and what each command prints."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.runtime.bench.bandwidth import last_level_cache, read_bandwidth
from apar.runtime.cli import COMMANDS, main
from apar.runtime.cli import generate as generate_command
from apar.runtime.cli.sampling_options import sampling_params
from apar.runtime.outputs import DeltaEvent, FinishEvent, ForkEvent, RequestOutput
from apar.runtime.reading_order import EventAssembler
from apar.runtime.sampling_params import SamplingParams

FORK_ID, EOS_ID = 259, 2
HERE = ["--graph", "portable", "--threads", "1"]
FORKING = ["--logit-bias", f"{FORK_ID}=5", "--temperature", "1", "--seed", "4", "--max-tokens", "60", *HERE]
"""Makes a random model fork; the seed makes it repeat itself."""
PLAIN = ["--max-tokens", "12", *HERE]
ENDLESS = ["--events", "--max-tokens", "900", "--ignore-eos", *HERE]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("engines") / "engine"
    assert main(["build", str(checkpoint), "-o", str(folder), "-q"]) == 0
    return str(folder)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("CI", "1")  # no spinning threads
    monkeypatch.setenv("APAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    yield


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run in this process; returns standard output and error."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    done = capsys.readouterr()
    assert "Traceback" not in done.err
    return done.out, done.err


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "apar.runtime.cli", *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )


def shell(before: str, *arguments: str, after: str = "") -> subprocess.CompletedProcess[str]:
    """Run to the end from a shell, with something `before` and `after` the command."""
    command = shlex.join([sys.executable, "-m", "apar.runtime.cli", *arguments])
    return subprocess.run(["sh", "-c", f"{before}{command} {after}"], check=False, capture_output=True, text=True)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments", [[], *[[name] for name in COMMANDS], ["bench", "generate"], ["bench", "host"]]
    )
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        out, err = run(capsys, *arguments, "--help")
        assert "usage: apar" in out and not err

    def test_defaults_are_shown_as_they_are_typed(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = " ".join(run(capsys, "bench", "serve", "--help")[0].split())
        assert "(default: 1 8 32)" in text

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(capsys, "--version")[0].startswith("apar ")

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["generat"],
            ["--nonsense"],
            ["generate"],
            ["generate", "x", "hello", "--max-tokens", "many"],
            ["generate", "x", "hello", "--top-p", "7"],
            ["generate", "x", "hello", "--temperature", "nan"],
            ["generate", "x", "hello", "--logit-bias", "12"],
            ["generate", "x", "hello", "--json", "--events"],
            ["generate", "x", "hello", "--raw-prompt", "--system", "s"],
            ["generate", "x", "hello", "--num-blocks", "4", "--kv-memory-mb", "4"],
            ["generate", "x", "hello", "--max-rows", "8", "--max-step-tokens", "4"],
            ["generate", "x", "hello", "--executor", "magic"],
            ["generate", "x"],
            ["generate", "x", "--file", "no-such-file"],
            ["build", "x"],
            ["build", "x", "-o", "y", "--dtype", "int3"],
            ["bench"],
            ["bench", "host", "--rows", "0"],
            ["bench", "generate", "x"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage_is_2(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        out, err = run(capsys, *arguments, code=2)
        assert not out and "apar" in err

    @pytest.mark.parametrize(
        "command", [["generate", "{}", "hello"], ["inspect", "{}"], ["build", "{}", "-o", "{}-out"]]
    )
    @pytest.mark.parametrize("source", ["missing", "empty"])
    def test_a_bad_path_is_1_and_one_sentence(
        self, command: list[str], source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / source
        if source == "empty":
            path.mkdir()
        _, err = run(capsys, *[part.format(path) for part in command], code=1)
        assert err.startswith("apar: error: ") and err.count("\n") == 1 and str(path) in err

    def test_help_loads_nothing_heavy(self) -> None:
        program = (
            "import sys\nfrom apar.runtime.cli import main\n"
            "for command in ([], ['build'], ['generate'], ['inspect'], ['bench'], ['bench', 'host']):\n"
            "    main([*command, '-h'])\n"
            "heavy = {'numpy', 'onnx', 'onnxruntime', 'torch', 'rich', 'tokenizers', 'jinja2'} & set(sys.modules)\n"
            "sys.exit(f'loaded {heavy}' if heavy else 0)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_options_cover_every_sampling_parameter(self) -> None:
        parser = generate_command.make_parser()
        assert sampling_params(parser.parse_command(["e"])) == SamplingParams()
        known = {option.lstrip("-").replace("-", "_") for option in parser._option_string_actions}
        assert {field.name for field in dataclasses.fields(SamplingParams)} - {"fork"} <= known

    def test_options_reach_their_parameters(self) -> None:
        options = """e --max-tokens 9 prompt --max-branch-tokens 8 --min-tokens 2 --no-fork --max-branches 3
            --max-depth 4 --temperature 0.5 --top-k 6 --top-p 0.75 --min-p 0.25 --seed 11 --repetition-penalty 1.5
            --presence-penalty 0.5 --frequency-penalty -0.5 --logit-bias 3=2 --logit-bias 4=-1.5 --bad-words no
            --bad-words-ids 5,6 --logprobs 2 --stop one --stop two --stop-token-ids 7,8 --include-stop-in-output
            --ignore-eos"""
        parsed = generate_command.make_parser().parse_command(options.split())
        assert parsed.prompts == ["prompt"]
        assert sampling_params(parsed) == SamplingParams(
            max_tokens=9, max_branch_tokens=8, min_tokens=2, fork=False, max_branches=3, max_depth=4, temperature=0.5,
            top_k=6, top_p=0.75, min_p=0.25, seed=11, repetition_penalty=1.5, presence_penalty=0.5,
            frequency_penalty=-0.5, logit_bias={3: 2.0, 4: -1.5}, bad_words=("no",),
            bad_words_ids=((5, 6),), logprobs=2, stop=("one", "two"),
            stop_token_ids=(7, 8), include_stop_in_output=True, ignore_eos=True,
        )  # fmt: skip


class TestBuild:
    def test_options_reach_the_engine(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "engine"
        _, err = run(
            capsys, "build", str(checkpoint), "-o", str(out), "--quantize", "int8", "--group-size", "16",
            "--block-size", "8", "--kv-dtype", "float32", "--max-context", "512", "--fork-token", "[SplitMask]",
            "--child-token", "260",
        )  # fmt: skip
        assert "weights: 100 %" in err and "int8 in groups of 16" in err and "peak memory" in err
        manifest = Manifest.load(out)
        assert (manifest.quantize, manifest.group_size, manifest.block_size) == ("int8", 16, 8)
        assert (manifest.kv_dtype, manifest.decoder.max_context, manifest.tokens.child) == ("float32", 512, 260)

    def test_an_engine_is_replaced_only_when_asked(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["build", str(checkpoint), "-o", str(tmp_path / "engine")]
        run(capsys, *arguments, "--quiet")
        assert "--overwrite" in run(capsys, *arguments, code=1)[1]
        run(capsys, *arguments, "--overwrite")


class TestGenerate:
    def test_text_alone_on_stdout_and_figures_on_stderr(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        out, err = run(capsys, "generate", engine, "hello", *FORKING)
        result = json.loads(run(capsys, "generate", engine, "hello", *FORKING, "--json")[0])
        assert out == result["text"] + "\n"
        assert len(result["branches"]) > 2
        usage, timing = result["usage"], result["timing"]
        assert timing["steps"] < usage["completion_tokens"]
        assert f"{usage['completion_tokens']} tokens in {timing['steps']} steps" in err

    def test_json_has_everything(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        out, _ = run(capsys, "generate", engine, "hello", *PLAIN, "--json", "--logprobs", "1", "--quiet")
        result = json.loads(out)
        assert {field.name for field in dataclasses.fields(RequestOutput)} <= set(result)
        assert result["prompt"] == "hello"
        assert result["branches"][0]["logprobs"][0]["top"]

    def test_events_rebuild_the_text(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        out, _ = run(capsys, "generate", engine, "hello", "again", *FORKING, "--events")
        kinds = {"fork": ForkEvent, "delta": DeltaEvent, "finish": FinishEvent}
        trees: dict[str, EventAssembler] = {}
        results = {}
        for line in objects(out):
            kind = line.pop("event")
            if kind == "result":
                results[line["request_id"]] = line
            else:
                trees.setdefault(line["request_id"], EventAssembler()).feed(kinds[kind](**line))
        assert len(results) == 2
        assert {name: tree.text() for name, tree in trees.items()} == {n: r["text"] for n, r in results.items()}
        assert [len(trees[name].branches) for name in results] == [len(r["branches"]) for r in results.values()]

    def test_no_fork(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        result = json.loads(run(capsys, "generate", engine, "hello", *FORKING, "--no-fork", "--json")[0])
        assert len(result["branches"]) == 1
        assert result["timing"]["steps"] == result["usage"]["completion_tokens"]

    def test_several_prompts_keep_their_order(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--quiet", "first", "the second question", *PLAIN]
        results = objects(run(capsys, "generate", engine, *arguments, "--json")[0])
        assert [r["prompt"] for r in results] == ["first", "the second question"]
        out, err = run(capsys, "generate", engine, *arguments)
        assert out == results[0]["text"] + "\n\n" + results[1]["text"] + "\n"
        assert "tokens" not in err

    @pytest.mark.parametrize("arguments", [[], ["-"], ["--file", "-"]])
    def test_standard_input(
        self, arguments: list[str], engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffhello\n"))
        out, _ = run(capsys, "generate", engine, *arguments, *PLAIN, "--json")
        assert json.loads(out)["prompt"] == "hello"

    def test_files_of_prompts(self, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = tmp_path / "prompts.txt"
        talk = [{"role": "user", "content": "hi"}]
        entries = ["a plain line", {"prompt": "from json", "id": 7}, {"messages": talk}]
        lines.write_text("\n".join([str(entries[0]), *map(json.dumps, entries[1:])]) + "\n", encoding="utf-8")
        listed = tmp_path / "prompts.json"
        listed.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        found = [
            objects(run(capsys, "generate", engine, "--file", str(path), *PLAIN, "--json")[0])
            for path in (lines, listed)
        ]
        assert [[r["prompt"] for r in each] for each in found] == [["a plain line", "from json", talk]] * 2
        assert found[0][1]["id"] == "7"

    def test_prompt_forms(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        def length(*arguments: str) -> int:
            out, _ = run(capsys, "generate", engine, "hello", *PLAIN, "--json", *arguments)
            return int(json.loads(out)["usage"]["prompt_tokens"])

        assert length("--raw-prompt") == 1 + len("hello")
        assert length("--system", "Be brief.") == 1 + len("Be brief. USER: hello ASSISTANT:")
        assert length("--system", "") == 1 + len("USER: hello ASSISTANT:")

    @pytest.mark.parametrize(
        ("line", "words"),
        [("{broken", "line 2"), ('{"question": "x"}', "line 2"), ('{"messages": [{"role": "x"}]}', "prompt 2")],
    )
    def test_a_bad_entry_is_named_and_nothing_runs(
        self, line: str, words: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(f"good\n{line}\n", encoding="utf-8")
        code = 1 if "role" in line else 2
        out, err = run(capsys, "generate", engine, "--file", str(path), *PLAIN, code=code)
        assert not out and words in err

    def test_a_prompt_too_long_is_1(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        _, err = run(capsys, "generate", engine, "x" * 2000, *PLAIN, code=1)
        assert "1024" in err and "shorten" in err

    def test_the_live_view_then_the_answer(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        out, err = run(capsys, "generate", engine, "hello", *FORKING, "--view", "live")
        plain, _ = run(capsys, "generate", engine, "hello", *FORKING, "--view", "plain")
        assert out == plain
        assert "branches" in err

    def test_a_checkpoint_is_built_once(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, built = run(capsys, "generate", str(checkpoint), "hello", *PLAIN)
        again, found = run(capsys, "generate", str(checkpoint), "hello", *PLAIN)
        assert first == again
        assert "building" in built and "building" not in found

    def test_a_cache_that_cannot_be(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("APAR_CACHE", str(tmp_path / "file"))
        _, err = run(capsys, "generate", str(checkpoint), "hello", *PLAIN, code=1)
        assert "cannot be made" in err and "$APAR_CACHE" in err

    def test_a_failed_answer_is_1(
        self, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from apar.runtime.executor.onnx import OnnxExecutor

        def fail(*_: object) -> None:
            raise ExecutorError("the memory is on fire")

        monkeypatch.setattr(OnnxExecutor, "execute", fail)
        _, err = run(capsys, "generate", engine, "hello", *PLAIN, code=1)
        assert "the memory is on fire" in err

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
    def test_interrupt_keeps_what_was_said(self, number: signal.Signals, code: int, engine: str) -> None:
        # The pipe holds 64 kB, so the process cannot finish before it is read on.
        process = start(
            "generate", engine, "hello", "--events", "--max-tokens", "900", "--ignore-eos", "--graph", "portable"
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code and "Traceback" not in err
        lines = objects(first + out)
        assert lines[-1]["event"] == "result" and lines[-1]["finish_reason"] == "cancelled"

    def test_a_reader_that_goes_away(self, engine: str) -> None:
        process = start(
            "generate", engine, "hello", "--events", "--max-tokens", "900", "--ignore-eos", "--graph", "portable"
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=300) == 141
        assert "Traceback" not in err and "Broken" not in err

    @pytest.mark.parametrize(
        ("redirection", "code", "said"),
        [(">/dev/full", 1, "apar: error: [Errno 28]"), (">&-", 0, "1 branch, "), ("2>&-", 0, "")],
    )
    def test_streams_that_take_nothing(self, redirection: str, code: int, said: str, engine: str) -> None:
        done = shell("", "generate", engine, "hello", *PLAIN, after=redirection)
        assert done.returncode == code, done.stderr
        assert said in done.stderr and "Traceback" not in done.stderr

    def test_a_list_of_messages_is_one_conversation(
        self, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        talk.append({"role": "user", "content": "c"})
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(talk)))
        out, _ = run(capsys, "generate", engine, "--file", "-", *PLAIN, "--json")
        assert json.loads(out)["prompt"] == talk

    def test_messages_that_are_none(
        self, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"messages": [65, 66]}'))  # not to be read as token ids
        _, err = run(capsys, "generate", engine, "--file", "-", *PLAIN, code=2)
        assert "line 1: `messages` must hold objects with `role` and `content`" in err

    def test_bytes_that_are_no_text(
        self, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", stdin)
        _, err = run(capsys, "generate", engine, *PLAIN, code=2)
        assert "standard input is not UTF-8 text: it holds the byte 0xE9 after 3 characters" in err

    def test_more_threads_than_any_machine_has(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        _, err = run(capsys, "generate", engine, "hello", "--threads", "5000", code=1)
        assert "threads must be between 1 and 1024" in err

    @pytest.mark.parametrize("option", ["--max-rows", "--max-step-tokens"])
    def test_tables_that_memory_does_not_hold(
        self, engine: str, option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, err = run(capsys, "generate", engine, "hello", option, str(10**13), code=2)
        assert f"{option[2:].replace('-', '_')} must be a whole number from 1 to" in err

    def test_prompts_nested_too_deep(self, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": ' + "[" * 100_000)
        assert "nested too deep" in run(capsys, "generate", engine, "--file", str(file), code=2)[1]

    def test_a_pool_that_memory_does_not_hold(self, engine: str) -> None:
        done = shell("ulimit -v 30000000; ", "generate", engine, "hello", "--kv-memory-mb", "99999999")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "the KV pool does not fit into memory" in done.stderr


class TestInspect:
    def test_a_terminal_of_unknown_width(
        self, engine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "0")
        assert "parameters" in run(capsys, "inspect", engine)[0]

    def test_engine(self, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
        facts = json.loads(run(capsys, "inspect", engine, "--json")[0])
        assert facts["kind"] == "engine" and facts["parameters"] == 109888
        assert facts["tokens"]["fork"] == {"id": FORK_ID, "text": "[SplitMask]"}
        assert facts["tokens"]["eos"] == [{"id": EOS_ID, "text": "</s>"}]
        assert facts["kv_bytes_per_block"] == 16 * facts["kv_bytes_per_token"] == 16 * 2 * 2 * 64 * 4
        assert facts["runs_here"]["graph"] == ("native" if facts["runs_here"]["isa"] else "portable")
        assert facts["bytes"] == sum(facts["files"].values())
        table, _ = run(capsys, "inspect", engine)
        assert "109,888" in table and "[SplitMask] = 259" in table and "model.onnx.data" in table

    def test_long_paths_stay_whole_in_a_pipe(
        self, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = tmp_path / ("long" * 40)
        shutil.copytree(engine, copy)
        assert str(copy) in run(capsys, "inspect", str(copy))[0]

    def test_where_a_gpu_can_run_it(
        self, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Device:  # stands for a GPU, which the machines of these tests need not have
            name = "Fake GPU"

        monkeypatch.setattr("apar.runtime.executor.choice.choose", lambda manifest, options: "torch")
        monkeypatch.setattr("apar.plugins.cuda_driver.CudaDevice", Device)
        here = json.loads(run(capsys, "inspect", engine, "--json")[0])["runs_here"]
        assert (here["executor"], here["reason"]) == ("torch", "Fake GPU can run it")
        table, _ = run(capsys, "inspect", engine)
        assert "torch executor, on the GPU" in table and "what the weights leave of the GPU's memory" in table

    def test_verify(self, engine: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(engine, copy)
        assert "checksums are right" in run(capsys, "inspect", str(copy), "--verify")[0]
        assert json.loads(run(capsys, "inspect", str(copy), "--verify", "--json")[0])["verified"] is True
        with (copy / "model.onnx.data").open("r+b") as file:
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 4]))
        assert "checksums" not in run(capsys, "inspect", str(copy))[0]
        assert "model.onnx.data is damaged" in run(capsys, "inspect", str(copy), "--verify", code=1)[1]
        assert "which has no checksums" in run(capsys, "inspect", str(checkpoint), "--verify", code=1)[1]

    def test_checkpoint(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        facts = json.loads(run(capsys, "inspect", str(checkpoint), "--json")[0])
        assert facts["kind"] == "checkpoint" and facts["max_context"] == 1024
        assert "not built" in run(capsys, "inspect", str(checkpoint))[0]

    def test_a_checkpoint_is_shown_as_it_would_be_built(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, target = tmp_path / "a 16-bit one", tmp_path / "the engine"
        make_checkpoint(folder, "gqa", dtype=torch.bfloat16)
        planned = json.loads(run(capsys, "inspect", str(folder), "--json")[0])
        _, said = run(capsys, "build", str(folder), "-o", str(target))
        assert f"apar generate '{target}' \"...\"" in said  # may be copied to a shell
        built = json.loads(run(capsys, "inspect", str(target), "--json")[0])
        same = ("source", "parameters", "model", "max_context", "dtype", "quantize", "block_size", "kv_dtype", "tokens")
        assert {key: planned[key] for key in same} == {key: built[key] for key in same}
        assert planned["dtype"] == "bfloat16"

    def test_what_a_directory_is_instead(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        for command in (["inspect", str(tmp_path)], ["generate", str(tmp_path), "Hello."]):
            assert "it holds an adapter (LoRA): merge it" in run(capsys, *command, code=1)[1]


class TestBench:
    @pytest.fixture(autouse=True)
    def quick_bandwidth(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from apar.runtime.bench import generate

        monkeypatch.setattr(generate, "read_bandwidth", lambda threads: read_bandwidth(threads, size=1 << 20, passes=1))

    def test_bandwidth(self) -> None:
        assert read_bandwidth(2, size=4 << 20, passes=2) > 0
        assert last_level_cache() > 1 << 16

    def test_host(self, capsys: pytest.CaptureFixture[str]) -> None:
        result = json.loads(run(capsys, "bench", "host", "--rows", "11", "--steps", "20", "--json")[0])
        assert (result["rows"], result["steps"]) == (11, 20)
        for key in ("host_us_per_step", "schedule_us", "commit_us", "sample_us", "fork_step_us", "busy_us_per_step"):
            assert result[key] > 0
        assert result["note_us_per_step"] > 0 and result["message_us_per_step"] > 0 and result["messages"] > 1
        assert result["busy_rows"] >= 10 and result["busy_births"] > 0 and result["busy_ends"] > 0
        assert {"cpu", "usable_cores", "isa", "versions"} <= set(result["machine"])
        command = ["bench", "host", "--rows", "11", "--steps", "20", "--fork-policy", "adaptive", "--json"]
        assert json.loads(run(capsys, *command)[0])["fork_policy"] == "adaptive"
        assert "schedule + commit" in run(capsys, "bench", "host", "--rows", "1", "--steps", "5")[0]

    def test_generate(self, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("one\ntwo\nthree\n", encoding="utf-8")
        arguments = ["bench", "generate", engine, "--prompts", str(prompts), "--limit", "2", "--repeat", "1", *PLAIN]
        for concurrency in ("1", "2"):
            out, _ = run(capsys, *arguments, "--concurrency", concurrency, "--json")
            result = json.loads(out)
            assert result["all"]["replies"] == 2
            assert result["all"]["plain"]["steps"] == result["all"]["plain"]["tokens"]
            assert result["step"][-1]["rows"] == int(concurrency)
            # The last tile of the 264 rows of lm_head is filled up to 272.
            assert result["bandwidth"]["weight_bytes_per_step"] == 4 * (109888 - 264 * 64 + 8 * 64)
            assert list(result["drafts"]) == ["forked+ngram", "forked+ngram measured"], "the engine has no heads"
            drafted = result["all"]["forked+ngram"]
            assert drafted["tokens"] == result["all"]["forked"]["tokens"] == drafted["steps"] * drafted["step_gain"]
            assert result["drafts"]["forked+ngram"]["acceptance_length"] >= 1
            assert drafted["steps"] <= result["all"]["forked"]["steps"]
        table, _ = run(capsys, *arguments)
        assert "gain in time / in steps" in table and "% of bandwidth bound" in table

    def test_drafts(self, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("one\ntwo\nthree\n", encoding="utf-8")
        arguments = ["bench", "drafts", engine, "--prompts", str(prompts), "--max-tokens", "30", "--draft", "ngram"]
        arguments += ["--num-speculative-tokens", "4", "--in-flight", "2", *PLAIN]
        result = json.loads(run(capsys, *arguments, "--json")[0])
        assert result["same_texts"]
        assert [item["rule"] for item in result["runs"]] == ["none", "rule", "measured", "fixed 1", "fixed 4"]
        none, rule = result["runs"][:2]
        assert none["verified"] == none["tokens"] == rule["tokens"] and rule["steps"] <= none["steps"]
        assert all(item["tokens_per_pass"] <= item["tokens_per_step"] for item in result["runs"])
        assert "all texts are the same" in run(capsys, *arguments)[0]

    def test_forked_replies_are_compared_on_their_own(self, engine: str) -> None:
        from apar.runtime.bench.generate import GenerateBench
        from apar.runtime.executor import load_executor
        from apar.runtime.tokenizer import Tokenizer

        params = {"max_tokens": 40, "temperature": 1.0, "seed": 4, "logit_bias": {FORK_ID: 5.0}}
        executor = load_executor(Path(engine), "onnx", graph="portable", threads=1)
        bench = GenerateBench(executor, Tokenizer.load(engine), params)
        try:
            result = bench.run([("x", "hello"), ("y", "again")], repeat=1)
        finally:
            bench.close()
        part = result["forked"]
        assert part["replies"] == 2
        assert part["forked"]["tokens_per_step"] > 1.2 and part["plain"]["branches_per_reply"] == 1
        assert part["step_gain"] == part["forked"]["tokens"] / part["forked"]["steps"]
        assert part["wall_gain"] > 0
        assert max(step["rows"] for step in result["step"]) > 1
