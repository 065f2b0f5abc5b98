"""Runs an engine's portable graph on rows whose slots the test chooses, and the model it must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from apar.export import manifest as m


class Portable:
    """Runs `model_portable.onnx` on rows whose slots the test chooses."""

    def __init__(self, engine: Path, slots: int = 96) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = str(engine / m.PORTABLE_GRAPH_NAME)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        config = m.Manifest.load(engine).decoder
        shape = (2, slots, config.num_kv_heads * config.head_dim)
        self.pools = {f"past_kv_{i}": np.full(shape, 7.0, np.float32) for i in range(config.num_layers)}

    def step(self, rows, copies=(), wanted=None) -> np.ndarray:
        """Rows are (pending tokens, path slots up to and with them); logits of all tokens, or of `wanted`."""
        context = sorted({slot for _, slots in rows for slot in slots})
        tokens = [token for pending, _ in rows for token in pending]
        visible = np.zeros((len(tokens), len(context)), bool)
        positions, targets = [], []
        for pending, slots in rows:
            for i in range(len(pending)):
                position = len(slots) - len(pending) + i
                visible[len(positions), [context.index(slot) for slot in slots[: position + 1]]] = True
                positions.append(position)
                targets.append(slots[position])
        feeds = {
            "input_ids": np.array(tokens, np.int32),
            "position_ids": np.array(positions, np.int32),
            "slot_mapping": np.array(targets, np.int64),
            "copy_source": np.array([a for a, _ in copies], np.int64),
            "copy_target": np.array([b for _, b in copies], np.int64),
            "context_slots": np.array(context, np.int64),
            "visible": visible,
            "logits_rows": np.array(range(len(tokens)) if wanted is None else wanted, np.int32),
        }
        names = ["logits", *(name.replace("past", "present") for name in self.pools)]
        logits, *pools = self.session.run(names, feeds | self.pools)
        self.pools = dict(zip(self.pools, pools, strict=True))
        return logits


def reference(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 260, count).tolist()
