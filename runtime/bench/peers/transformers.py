"""Hugging Face transformers on PyTorch, random weights of the same shape, one batch of rows."""

from __future__ import annotations

import torch
import transformers

from apar.runtime.bench.peers.protocol import Task

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    """LlamaForCausalLM with a key-value cache."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        torch.set_num_threads(task.threads)
        config = transformers.LlamaConfig(**task.config)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        model = model.to(TYPES[task.weights]).to_empty(device="cpu").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1) if name.endswith("norm.weight") else parameter.normal_(0, 0.02)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
        self._model, self._task = model, task
        self._cache = transformers.DynamicCache()
        self._rows = 0
        self.detail = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {task.weights}, "
            f"{task.threads} threads, attention {model.config._attn_implementation}"
        )

    def begin(self, rows: int) -> None:
        """See Peer.begin."""
        self._rows, self._cache = rows, transformers.DynamicCache()
        self._run(self._task.context)

    def step(self) -> None:
        """See Peer.step."""
        self._run(1)

    def _run(self, count: int) -> None:
        ids = torch.randint(3, self._task.config["vocab_size"], (self._rows, count))
        with torch.inference_mode():
            self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


load = Transformers
