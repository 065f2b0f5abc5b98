"""`apar build`: a checkpoint becomes an engine directory."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from apar.export.errors import RequestError
from apar.export.manifest_rules import DTYPES, KV_DTYPES, METHODS, QUANTIZATIONS
from apar.runtime.cli.build_tensorrt import (
    FORMATS,
    add_tensorrt_options,
    build_tensorrt,
    build_trtllm,
    check_format,
)
from apar.runtime.cli.parser import Parser, whole
from apar.runtime.cli.progress import BuildProgress

if TYPE_CHECKING:
    from apar.export.manifest import Manifest
    from apar.runtime.calibration import CalibrationText

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Build an engine directory from a Hugging Face checkpoint (Llama, Mistral or Qwen2; safetensors or pytorch_model-*.bin)
or from a TensorRT-LLM one. --format tensorrt compiles it for the GPU of this machine; trtllm writes a TensorRT-LLM
checkpoint.

Weights are streamed, so memory stays small whatever the model's size. The engine appears whole or not at all: a
build that fails or is interrupted leaves an engine that was there before as it was.

Which quantisation: int8 is as good as the float weights. int4 reads half the bytes again; with gptq, its default,
it loses clearly less than plain rounding (docs/quantization.md has the figures). Larger groups and no zero
points are smaller and faster, smaller groups and zero points are closer to the float model.
"""
EPILOG = """\
examples:
  apar build ./vicuna-7b-apar -o ./engine
  apar build ./vicuna-7b-apar -o ./engine-int4 --quantize int4
  apar build ./vicuna-7b-apar -o ./engine-gpu --format tensorrt --max-rows 128 --max-tokens 2048
  apar build ./vicuna-7b-apar -o ./engine-int4 --quantize int4 --calibration questions.jsonl
  apar build ./vicuna-7b-apar -o ./engine-int4 --quantize int4 --quantize-method rtn --group-size 128
  apar build ./my-model -o ./engine --fork-token "<fork>" --child-token "<child>" --max-context 4096
"""


def make_parser() -> Parser:
    """Options of `apar build`."""
    parser = Parser(prog="apar build", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="directory with config.json, weights, tokenizer, or `tiny`"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the engine directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an engine that is already at DIR, at the end")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="what to make: an engine for CPUs and torch (onnx), a TensorRT engine, or a TensorRT-LLM checkpoint",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="directory of the tokenizer, where it is not in CHECKPOINT"
    )
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        help="how weights that are not quantised are stored (default: auto, as in the checkpoint, which loses nothing; "
        "float16 in the other formats)",
    )
    weights.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        default="none",
        help="store projections in 8 or 4 bits; int4 keeps the last matrix (lm_head) at int8",
    )
    weights.add_argument(
        "--group-size",
        type=whole(1),
        metavar="N",
        help="with --quantize: input channels that share a scale; 16, 32, 64, 128 or 256 (default: 32 for int4; "
        "int8 has one scale for each output channel)",
    )
    weights.add_argument(
        "--quantize-method",
        choices=METHODS,
        help="how the integers are chosen; gptq runs the layers on a calibration text and makes rounding errors cancel "
        "out, which takes seconds to minutes for small models and far longer for 7B; rtn rounds to nearest (default: "
        "gptq for int4, rtn for int8)",
    )
    weights.add_argument(
        "--zero-points", action="store_true", help="groups have zero points of their own, beside a scale"
    )
    weights.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for gptq: texts or questions, one a line, or JSON lines, such as the output of `apar generate --json` "
        "(default: the checkpoint's calibration.jsonl, or else a text that ships with APAR)",
    )
    weights.add_argument(
        "--calibration-tokens",
        type=whole(1),
        default=8192,
        metavar="N",
        help="use at most the first N tokens of it",
    )
    weights.add_argument(
        "--draft-heads",
        metavar="DIR",
        help="directory with Medusa heads for this checkpoint, or `none` (default: its `medusa` folder, or its "
        "medusa_heads.* tensors, where it has them)",
    )
    cache = parser.add_argument_group("KV cache")
    cache.add_argument(
        "--block-size", type=whole(1), default=16, metavar="N", help="tokens in a block: 8, 16, 32, 64 or 128"
    )
    cache.add_argument(
        "--kv-dtype",
        choices=("auto", *KV_DTYPES),
        default="auto",
        help="type of keys and values; auto is float32 beside float32 weights, float16 otherwise",
    )
    cache.add_argument(
        "--max-context",
        type=whole(1),
        metavar="N",
        help="longest path in tokens (default: the checkpoint's max_position_embeddings)",
    )
    tokens = parser.add_argument_group("control tokens")
    tokens.add_argument(
        "--fork-token", metavar="S", help="string or id of [Fork] in this tokenizer (default: [SplitMask])"
    )
    tokens.add_argument(
        "--child-token", metavar="S", help="string or id of [Child] in this tokenizer (default: [SplitSop])"
    )
    add_tensorrt_options(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary")
    parser.add_debug()
    return parser


def run(options: argparse.Namespace) -> int:
    """Build and say what came out. Raises BuildError, CheckpointError, TokenizerError."""
    from apar.export.onnx_engine import build
    from apar.runtime.engine_source import named_directory

    options.checkpoint = named_directory(options.checkpoint)
    try:
        defaults = {action.dest: action.default for action in options.parser._actions}
        check_format(options, defaults)
        calibration = _calibration(options)
    except RequestError as error:
        options.parser.error(str(error))
    if options.format != "onnx":
        return build_tensorrt(options) if options.format == "tensorrt" else build_trtllm(options)
    began = time.monotonic()
    with BuildProgress(sys.stderr, "", quiet=options.quiet) as progress:
        manifest = build(
            options.checkpoint,
            options.output,
            dtype=options.dtype or "auto",
            quantize=options.quantize,
            group_size=options.group_size,
            quantize_method=options.quantize_method,
            zero_points=options.zero_points,
            calibration=calibration,
            block_size=options.block_size,
            kv_dtype=options.kv_dtype,
            tokenizer=options.tokenizer,
            fork_token=options.fork_token,
            child_token=options.child_token,
            max_context=options.max_context,
            draft_heads=options.draft_heads,
            overwrite=options.overwrite,
            progress=progress,
        )
    _try_chat(options.output, manifest)
    if not options.quiet:
        print(summary(options.output, manifest, time.monotonic() - began), file=sys.stderr)
    return 0


def _try_chat(engine: Path, manifest: Manifest) -> None:
    """Warn of a chat template that takes no question: better now than at the first one."""
    from apar.runtime.chat import render_chat
    from apar.runtime.tokenizer import Tokenizer

    try:
        render_chat([{"role": "user", "content": "Hello"}], Tokenizer.load(engine, manifest))
    except RequestError as error:
        logger.warning("the engine is complete, but takes prompts without the chat template only: %s", error)


def _calibration(options: argparse.Namespace) -> CalibrationText | None:
    """The text that gptq is calibrated with; None where another method is chosen."""
    from apar.runtime.calibration import CalibrationText

    default = "gptq" if options.quantize == "int4" else "rtn"
    if options.quantize != "none" and (options.quantize_method or default) == "gptq":
        return CalibrationText(options.calibration, options.calibration_tokens)
    if options.calibration is not None:
        raise RequestError("--calibration is for --quantize-method gptq, with --quantize int4 or int8")
    return None


def summary(output: Path, manifest: Manifest, seconds: float) -> str:
    """What was built, in three lines."""
    from apar.runtime.bench.machine import peak_memory
    from apar.runtime.cli.inspect import human_bytes, weights_text

    decoder = manifest.decoder
    context = decoder.kv_bytes_per_token(manifest.kv_dtype) * decoder.max_context
    peak = peak_memory()
    return "\n".join(
        (
            f"{output}: {human_bytes(sum(manifest.files.values()))} in {seconds:.1f} s"
            + (f", peak memory {human_bytes(peak)}" if peak else ""),
            f"  weights {weights_text(manifest)}; keys and values {manifest.kv_dtype}, blocks of {manifest.block_size}"
            f", {human_bytes(context)} for a full context of {decoder.max_context} tokens",
            f'  try it: apar generate {shlex.quote(str(output))} "..."',
        )
    )
