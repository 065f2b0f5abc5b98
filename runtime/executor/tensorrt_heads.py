"""Medusa heads of a TensorRT engine: an engine of their own, which reads the hidden states that the last step left."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apar.export.errors import ExecutorError
from apar.export.manifest import Manifest
from apar.plugins.cuda_driver import CudaDevice
from apar.runtime.executor.tensorrt_session import TensorRtSession
from apar.runtime.step import Float32Array, IntArray

_EXPECTED = {"hidden": "float32", "wanted": "int32", "draft_logits": "float32"}


class TensorRtHeads:
    """Draft logits of some tokens of the last step."""

    def __init__(
        self, session: TensorRtSession, device: CudaDevice, stream: int, manifest: Manifest, hidden: int
    ) -> None:
        """Takes over `session`. `hidden` is the address of float32 [max_tokens, hidden].

        Raises ExecutorError for an engine of something else, PluginError where memory is short; the session is then
        closed.
        """
        facts, heads = manifest.tensorrt, manifest.draft_heads
        assert facts is not None
        assert heads is not None
        self._session, self._device, self._stream = session, device, stream
        self._memory: list[int] = []
        self._host: list[npt.NDArray[np.uint8]] = []
        try:
            if session.tensors != _EXPECTED or session.num_profiles != 1:
                raise ExecutorError(f"{session.path} holds no Medusa heads of this engine; build the engine again")
            self._context = session.context(0)
            indices = device.allocate_host(4 * facts.max_rows)
            self._host.append(indices)
            logits = device.allocate_host(_logits_bytes(manifest))
            self._host.append(logits)
            for size in (4 * facts.max_rows, _logits_bytes(manifest)):
                self._memory.append(device.allocate(size))
        except BaseException:
            self.close()
            raise
        self._wanted = indices.view(np.int32)
        self._logits: Float32Array = logits.view(np.float32).reshape(-1, heads.count, manifest.decoder.vocab_size)
        self._width, self._hidden_rows = manifest.decoder.hidden_size, facts.max_tokens
        self._context.bind(
            {"hidden": hidden, "wanted": self._memory[0], "draft_logits": self._memory[1]},
            {"hidden": (self._hidden_rows, self._width)},
        )

    @staticmethod
    def bytes_needed(manifest: Manifest) -> int:
        """Device memory beside the engine's own weights: draft logits, and room for TensorRT's scratch."""
        assert manifest.tensorrt is not None
        return 2 * _logits_bytes(manifest) + 8 * manifest.tensorrt.max_rows * manifest.decoder.hidden_size

    def run(self, wanted: IntArray) -> Float32Array:
        """float32 [N, heads, vocab] of the rows `wanted` of the step's hidden states; valid until the next call."""
        count = wanted.size
        if count > self._wanted.size:
            raise ExecutorError(
                f"draft logits of {count} tokens are wanted, the engine was built for {self._wanted.size}"
            )
        logits = self._logits[:count]
        if not count:
            return logits
        self._wanted[:count] = wanted
        self._device.to_device(self._memory[0], self._wanted[:count], self._stream)
        self._context.bind({}, {"wanted": (count,)})
        self._context.enqueue()
        self._device.to_host(logits, self._memory[1], self._stream)
        self._device.synchronize(self._stream)
        return logits

    def close(self) -> None:
        """Free the heads. Idempotent."""
        self._context = None  # type: ignore[assignment] # it refers to the engine
        self._session.close()
        for address in self._memory:
            self._device.free(address)
        self._memory.clear()
        for array in self._host:
            self._device.free_host(array)
        self._host.clear()


def _logits_bytes(manifest: Manifest) -> int:
    assert manifest.tensorrt is not None
    assert manifest.draft_heads is not None
    return 4 * manifest.tensorrt.max_rows * manifest.draft_heads.count * manifest.decoder.vocab_size
