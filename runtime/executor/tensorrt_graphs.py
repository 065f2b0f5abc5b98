"""CUDA graphs of steps that came before, by the step's shape.

TensorRT's guide asks for one execution context for each captured graph: a context that is told other shapes or
addresses after the capture makes the graph's results undefined.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable

from apar.export.errors import ExecutorError, PluginError
from apar.plugins.cuda_driver import CudaDevice
from apar.runtime.executor.tensorrt_session import TensorRtContext
from apar.runtime.executor.tensorrt_step import StepShape

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
"""The least recently used one makes room for the next."""


class StepGraphs:
    """Runs steps of known shapes as CUDA graphs, and learns shapes that come again."""

    def __init__(self, device: CudaDevice, stream: int, make_context: Callable[[StepShape], TensorRtContext]) -> None:
        """`make_context` gives a new context that is bound for a step of the shape."""
        self._device, self._stream, self._make_context = device, stream, make_context
        self._graphs: collections.OrderedDict[StepShape, tuple[int, TensorRtContext]] = collections.OrderedDict()
        self._seen: collections.OrderedDict[StepShape, None] = collections.OrderedDict()
        self._usable = True

    def run(self, shape: StepShape) -> bool:
        """Run the step, whose tensors are in place, if its shape was seen before; otherwise remember the shape."""
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            self._device.launch_graph(self._graphs[shape][0], self._stream)
            return True
        if not self._usable:
            return False
        if shape not in self._seen:
            self._seen[shape] = None
            if len(self._seen) > 2 * MAX_GRAPHS:
                self._seen.popitem(last=False)
            return False
        del self._seen[shape]
        return self._learn(shape)

    def _learn(self, shape: StepShape) -> bool:
        """Run the step in a context of its own, then record that context. Returns whether the step was run."""
        run = False
        try:
            context = self._make_context(shape)
            context.enqueue()  # TensorRT takes in new shapes at the first execution, which must not be recorded
            run = True
            self._device.synchronize(self._stream)
            with self._device.capture(self._stream) as made:
                context.enqueue()
        except (ExecutorError, PluginError) as error:
            logger.warning("steps run without CUDA graphs from now on, since one could not be recorded: %s", error)
            self._usable = False
            return run
        self._graphs[shape] = made[0], context
        if len(self._graphs) > MAX_GRAPHS:
            self._device.destroy_graph(self._graphs.popitem(last=False)[1][0])
        return True

    def close(self) -> None:
        """Free the graphs and their contexts. Idempotent."""
        while self._graphs:
            self._device.destroy_graph(self._graphs.popitem()[1][0])
