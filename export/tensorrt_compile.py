"""From an ONNX graph to a serialised TensorRT engine: network, profiles, builder settings, log and progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import onnx

from apar.export.errors import BuildError
from apar.export.manifest import TensorRtEngine
from apar.export.tensorrt_api import major
from apar.export.tensorrt_profiles import DECODE, MIXED, ranges, shapes

Progress = Callable[[str, int, int], None]
_STEPS = 1000
"""Progress is told in thousandths of a phase."""
_KEPT_ERRORS = 5


class BuildLog:
    """TensorRT's messages: all of them in a file, the last errors for people."""

    def __init__(self, trt: Any, file: TextIO) -> None:
        self.errors: list[str] = []
        self._began = time.monotonic()
        log = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                log.write(file, severity, msg)

        self.logger = Logger()

    def write(self, file: TextIO, severity: Any, message: str) -> None:
        """Keep one message."""
        name = str(severity).rpartition(".")[2]
        if name in ("ERROR", "INTERNAL_ERROR"):
            self.errors = [*self.errors, message.strip()][-_KEPT_ERRORS:]
        if name != "VERBOSE":
            file.write(f"{time.monotonic() - self._began:9.3f} {name:7} {message}\n")

    def summary(self) -> str:
        """The last errors as one line."""
        return "; ".join(self.errors) or "it gave no reason"


def compile_graph(
    trt: Any,
    graph: Path,
    engine: Path,
    facts: TensorRtEngine,
    *,
    log: BuildLog,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Compile `graph` and write the engine to the file `engine`. The plugins must have been loaded.

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
    _add_profiles(builder, config, network, graph, facts)
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache and timing_cache.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise BuildError(f"TensorRT {trt.__version__} cannot compile the graph: {log.summary()}")
    try:
        with engine.open("wb") as file:
            file.write(serialized)
        if timing_cache is not None:
            timing_cache.parent.mkdir(parents=True, exist_ok=True)
            timing_cache.write_bytes(config.get_timing_cache().serialize())
    except OSError as error:
        raise BuildError(f"{error.filename} cannot be written: {error}") from error


def _network_flags(trt: Any) -> int:
    """Strongly typed: types are those of the graph. From TensorRT 11 on, networks are nothing else."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if major(trt) == 10 else 0


def _parse_errors(parser: Any) -> str:
    found = []
    for i in range(min(parser.num_errors, _KEPT_ERRORS)):
        error = parser.get_error(i)
        found.append(f"{error.node_operator()} {error.node_name()}: {error.desc()}")
    return "; ".join(found) or "its parser gave no reason"


def _add_profiles(builder: Any, config: Any, network: Any, graph: Path, facts: TensorRtEngine) -> None:
    dimensions = graph_dimensions(graph)
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    for which in (DECODE, MIXED):
        symbols = ranges(facts, which)
        profile = builder.create_optimization_profile()
        for name in inputs:
            profile.set_shape(name, *shapes(dimensions[name], symbols))
        if config.add_optimization_profile(profile) != which:
            raise BuildError(f"TensorRT does not take the optimisation profile {which}: a size of it is impossible")


def graph_dimensions(graph: Path) -> Mapping[str, list[int | str]]:
    """Numbers and symbols of each input's shape."""
    inputs = onnx.load(graph, load_external_data=False).graph.input
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs
    }


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """TensorRT's phases as one bar: thousandths of the outermost phase, refined by the phase in it."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
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
            except KeyboardInterrupt:  # an exception cannot pass through TensorRT
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if self._outer is not None and phase_name == self._outer[0]:
                self._outer = None
                self._show(1.0)

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
