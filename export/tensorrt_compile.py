"""From an ONNX graph to a serialised TensorRT engine: network, profiles, builder settings, log and progress."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import onnx

from apar.export.errors import BuildError
from apar.export.tensorrt_api import major
from apar.export.tensorrt_profiles import Range, shapes

Progress = Callable[[str, int, int], None]
_STEPS = 1000
"""Progress is told in thousandths of a phase."""
_KEPT_ERRORS = 5


class BuildLog:
    """TensorRT's messages: all of them in a file, the last errors for people.

    TensorRT may still speak while its objects end, and an exception cannot pass through it: what a disk or Ctrl-C does
    to a message is kept for later.
    """

    def __init__(self, trt: Any, file: TextIO) -> None:
        self.errors: list[str] = []
        self.interrupted = False
        self._began = time.monotonic()
        self._file = file
        log, verbose = self, trt.ILogger.Severity.VERBOSE

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity != verbose:
                    log.write(severity, msg)

        self.logger = Logger()

    def write(self, severity: Any, message: str) -> None:
        """Keep one message."""
        try:
            name = str(severity).rpartition(".")[2]
            if name in ("ERROR", "INTERNAL_ERROR"):
                self.errors = [*self.errors, message.strip()][-_KEPT_ERRORS:]
            if not self._file.closed:
                self._file.write(f"{time.monotonic() - self._began:9.3f} {name:7} {message}\n")
        except KeyboardInterrupt:
            self.interrupted = True
        except OSError as error:
            self.errors = [*self.errors, f"the log cannot be written: {error}"][-_KEPT_ERRORS:]

    def summary(self) -> str:
        """The last errors as one line."""
        return "; ".join(self.errors) or "it gave no reason"


def compile_graph(
    trt: Any,
    graph: Path,
    engine: Path,
    profiles: Sequence[Mapping[str, Range]],
    *,
    log: BuildLog,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Compile `graph` and write the engine to the file `engine`. The plugins must have been loaded.

    profiles: the ranges of the graph's symbolic dimensions, for each optimisation profile.
    workspace_bytes: most scratch memory that layers may ask for; by default all of the GPU's.
    optimization_level: TensorRT's 0 to 5 (its default is 3); higher takes longer.
    timing_cache: file with measurements of earlier builds, read where it is there and written again.
    Raises BuildError with what TensorRT said. Ctrl-C ends the build at TensorRT's next step.
    """
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"TensorRT {trt.__version__} cannot take the graph: {_parse_errors(parser)}")
    config = builder.create_builder_config()
    aliased = getattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
    if aliased is not None:
        config.set_preview_feature(aliased, True)
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _add_profiles(builder, config, network, graph, profiles)
    cache = _attach_cache(config, timing_cache, log)
    monitor = _monitor(trt, log, progress)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if log.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise BuildError(f"TensorRT {trt.__version__} cannot compile the graph: {log.summary()}")
    try:
        with engine.open("wb") as file:
            file.write(serialized)
    except OSError as error:
        raise BuildError(f"{engine} cannot be written: {error}") from error
    if timing_cache is not None:
        _save_cache(cache, timing_cache, log)


def _attach_cache(config: Any, path: Path | None, log: BuildLog) -> Any:
    """The timing cache that the build uses: of the file, or a new one where TensorRT does not take the file's."""
    with contextlib.suppress(OSError):
        content = path.read_bytes() if path and path.is_file() else b""
        cache = config.create_timing_cache(content) if content else None
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        if content:
            log.write("WARNING", f"the timing cache {path} is damaged or of another GPU; a new one takes its place")
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_cache(cache: Any, path: Path, log: BuildLog) -> None:
    """Write the cache whole or not at all. An engine is worth more than its measurements: a failure is only logged."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(cache.serialize())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        log.write("WARNING", f"the timing cache {path} cannot be written: {error}")


def _network_flags(trt: Any) -> int:
    """Strongly typed: types are those of the graph. From TensorRT 11 on, networks are nothing else."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if major(trt) == 10 else 0


def _parse_errors(parser: Any) -> str:
    found = []
    for i in range(min(parser.num_errors, _KEPT_ERRORS)):
        error = parser.get_error(i)
        found.append(f"{error.node_operator()} {error.node_name()}: {error.desc()}")
    return "; ".join(found) or "its parser gave no reason"


def _add_profiles(
    builder: Any, config: Any, network: Any, graph: Path, profiles: Sequence[Mapping[str, Range]]
) -> None:
    dimensions = graph_dimensions(graph)
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    for number, symbols in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name in inputs:
            profile.set_shape(name, *shapes(dimensions[name], symbols))
        if config.add_optimization_profile(profile) != number:
            raise BuildError(f"TensorRT does not take the optimisation profile {number}: a size of it is impossible")


def graph_dimensions(graph: Path) -> Mapping[str, list[int | str]]:
    """Numbers and symbols of each input's shape."""
    inputs = onnx.load(graph, load_external_data=False).graph.input
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs
    }


def _monitor(trt: Any, log: BuildLog, progress: Progress | None) -> Any:
    """TensorRT's phases as one bar: thousandths of the outermost phase, refined by the phase in it.

    An exception cannot pass through TensorRT: Ctrl-C is noted in `log`, and ends the build at the next step.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outer: tuple[str, int] | None = None
            self._inner: tuple[str, int] | None = None
            self._done = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self._outer is None:
                self._outer = (phase_name, max(num_steps, 1))
            elif parent_phase == self._outer[0]:
                self._inner = (phase_name, max(num_steps, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self._tell(phase_name, step + 1)
            except KeyboardInterrupt:
                log.interrupted = True
            return not log.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if self._outer is not None and phase_name == self._outer[0]:
                self._outer = None
                try:
                    self._show(1.0)
                except KeyboardInterrupt:
                    log.interrupted = True

        def _tell(self, phase: str, steps: int) -> None:
            if self._outer is None:
                return
            name, count = self._outer
            if phase == name:
                self._show(steps / count)
            elif self._inner is not None and phase == self._inner[0]:
                whole = int(self._done * count + 1e-9)
                self._show((whole + steps / self._inner[1] * 0.999) / count)

        def _show(self, done: float) -> None:
            self._done = max(self._done, min(done, 1.0))
            if progress:
                progress("engine", int(self._done * _STEPS), _STEPS)

    return Monitor()
