"""Train Medusa heads for the tiny model, its own weights frozen (Medusa-1, arXiv 2401.10774), and evaluate them.

A head is some residual blocks (x + SiLU(Linear(x))) on the last hidden state, then the model's own `lm_head`; head i
predicts the token at offset 2 + i. The rows of a conversation are merged as in `train_tiny.py`, and each row says what
follows: the state that predicts [Fork] therefore learns both what the parent and what the child write next, which is
what a child's first draft comes from. [Child] itself is forced, so it is no target.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_corpus import Corpus, prompt
from torch import Tensor, nn
from train_tiny import (
    BATCH,
    BOS_ID,
    CHILD_ID,
    EOS_ID,
    FORK_ID,
    HIDDEN,
    LAYERS,
    SEQUENCE,
    Batch,
    Model,
    Muon,
    Sequence,
    Tokenizer,
    add_conversation,
    collate,
    decode,
)

NUM_HEADS, NUM_BLOCKS = 4, 2
RANKS = 10
FOLDER, CONFIG_NAME, WEIGHTS_NAME = "medusa", "config.json", "medusa_lm_head.safetensors"


class Block(nn.Module):
    """x + SiLU(Linear(x)), the identity before training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Heads(nn.Module):
    """The residual blocks of all heads; `lm_head` is the model's."""

    def __init__(self, heads: int = NUM_HEADS, blocks: int = NUM_BLOCKS) -> None:
        super().__init__()
        self.blocks = blocks
        self.stacks = nn.ModuleList(nn.Sequential(*(Block() for _ in range(blocks))) for _ in range(heads))

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """[N, hidden] -> for each head the state that goes into `lm_head`."""
        return [stack(hidden) for stack in self.stacks]

    def save(self, checkpoint: Path) -> None:
        """Write the `medusa` folder of a checkpoint, float16."""
        folder = checkpoint / FOLDER
        folder.mkdir(exist_ok=True)
        weights = {}
        for number, stack in enumerate(self.stacks):
            for name, weight in stack.state_dict().items():
                weights[f"{number}.{name}"] = weight.to(torch.float16).contiguous()
        partial = folder / f"{WEIGHTS_NAME}.part"
        save_file(weights, partial, metadata={"format": "pt"})
        partial.chmod(0o644)
        partial.replace(folder / WEIGHTS_NAME)
        config = {
            "medusa_num_heads": len(self.stacks),
            "medusa_num_layers": self.blocks,
            "medusa_tied_lm_head": True,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, checkpoint: Path) -> Heads:
        """Read what `save` wrote."""
        config = json.loads((checkpoint / FOLDER / CONFIG_NAME).read_text())
        heads = cls(config["medusa_num_heads"], config["medusa_num_layers"])
        weights = load_file(checkpoint / FOLDER / WEIGHTS_NAME)
        heads.stacks.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return heads


# ------------------------------------------------------------------------------------------------------ targets


@dataclass(slots=True)
class Targets:
    """What heads learn from a batch: for each head, flat indices of states and the tokens they should predict."""

    sources: list[list[int]]
    tokens: list[list[int]]


@dataclass(slots=True)
class PathSequence(Sequence):
    """A sequence that keeps its rows: the node and the token at each position, and where learning starts."""

    rows: list[tuple[list[int], list[int], int]] = field(default_factory=list)

    def add(self, row: list[int], learn_from: int) -> None:
        """Add a row; tokens from position ``learn_from`` on are targets."""
        Sequence.add(self, row, learn_from)
        nodes, parent = [], -1
        for token in row[:-1]:
            parent = self._children[parent, token]
            nodes.append(parent)
        self.rows.append((nodes, row, learn_from))


def targets_of(group: list[PathSequence], length: int, heads: int) -> Targets:
    """Targets of a batch whose sequences are padded to ``length``."""
    found = Targets([[] for _ in range(heads)], [[] for _ in range(heads)])
    for number, sequence in enumerate(group):
        for nodes, row, start in sequence.rows:
            child = row[start - 1] == CHILD_ID
            # A child drafts first from the state that predicted [Fork], then from [Child]'s on.
            first = start - 3 if child else start - 1
            for position in range(first, len(row) - 2):
                if child and position == start - 2:
                    continue
                for head in range(min(heads, len(row) - position - 2)):
                    target = row[position + 2 + head]
                    if target != CHILD_ID:
                        found.sources[head].append(number * length + nodes[position])
                        found.tokens[head].append(target)
    return found


def states(model: Model, batch: Batch) -> Tensor:
    """[B * T, hidden] after the last norm: what `lm_head` and the heads read."""
    cos, sin = model.cos[batch.positions][:, None], model.sin[batch.positions][:, None]
    x = model.embedding(batch.ids)
    for layer in model.blocks:
        x = layer(x, batch.mask, cos, sin)
    hidden: Tensor = model.norm(x).flatten(0, 1)
    return hidden


def load_model(folder: Path) -> Model:
    """The tiny model's weights in the module that trained them."""
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    model = Model()
    state = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for number in range(LAYERS):
        theirs, ours = f"model.layers.{number}.", f"layers.{number}."
        attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
        state |= {
            f"{ours}qkv.weight": torch.cat([weights[f"{attention}{part}_proj.weight"] for part in "qkv"]),
            f"{ours}out.weight": weights[f"{attention}o_proj.weight"],
            f"{ours}gate_up.weight": torch.cat([weights[f"{mlp}{part}_proj.weight"] for part in ("gate", "up")]),
            f"{ours}down.weight": weights[f"{mlp}down_proj.weight"],
            f"{ours}attention_norm.weight": weights[f"{theirs}input_layernorm.weight"],
            f"{ours}mlp_norm.weight": weights[f"{theirs}post_attention_layernorm.weight"],
        }
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------- training


def stream(tokenizer: Tokenizer, seed: int) -> Iterator[PathSequence]:
    """Endless sequences of `train_tiny.sequences`, with their rows."""
    current = PathSequence()
    for conversation in Corpus().train(seed):
        alone = PathSequence()
        add_conversation(alone, conversation, tokenizer)
        if current.ids and len(current.ids) + len(alone.ids) > SEQUENCE:
            yield current
            current = PathSequence()
        if len(alone.ids) <= SEQUENCE:
            add_conversation(current, conversation, tokenizer)


def train(folder: Path, steps: int, seed: int, rate: float) -> float:
    """Train heads for the checkpoint in ``folder`` and write them into it; the seconds it took."""
    began = said = saved = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    model, heads = load_model(folder), Heads()
    muon = Muon([weight for weight in heads.parameters() if weight.dim() == 2], 0, 1, decay=0.0)
    adam = torch.optim.AdamW([w for w in heads.parameters() if w.dim() < 2], lr=rate, weight_decay=0.0)
    data = stream(tokenizer, seed + 1)
    losses: list[float] = []
    warmup = max(1, steps // 30)
    for step in range(1, steps + 1):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        now = rate * min(step / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        adam.param_groups[0]["lr"] = now
        group = list(islice(data, BATCH))
        batch = collate(group)
        wanted = targets_of(group, batch.ids.shape[1], NUM_HEADS)
        with torch.no_grad():
            hidden = states(model, batch)
        loss = torch.zeros(())
        parts = []
        for head, (sources, tokens) in enumerate(zip(wanted.sources, wanted.tokens, strict=True)):
            state = heads.stacks[head](hidden[torch.tensor(sources)])
            part = F.cross_entropy(model.head(state), torch.tensor(tokens))
            parts.append(part.item())
            loss = loss + part * 0.8**head
        loss.backward()
        muon.step(now)
        adam.step()
        heads.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if time.monotonic() - said > 10 or step == steps:
            said = time.monotonic()
            recent = losses[-20:]
            print(
                f"step {step}/{steps} loss {sum(recent) / len(recent):.3f} heads {[round(p, 2) for p in parts]} "
                f"eta {(said - began) / step * (steps - step):.0f} s",
                flush=True,
            )
        if time.monotonic() - saved > 60 or step == steps:
            heads.save(folder)
            saved = time.monotonic()
    return time.monotonic() - began


# --------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(folder: Path, limit: int = 400) -> dict[str, object]:
    """How often a head's first, first three and first RANKS guesses hold the token that greedy decoding of the
    held-out prompts takes. Writes ``medusa/evaluation.json``."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    model, heads = load_model(folder), Heads.load(folder)
    count = len(heads.stacks)
    hits = torch.zeros(count, RANKS)
    totals = torch.zeros(count)
    for entry in json.loads((folder / "heldout.json").read_text(encoding="utf-8")):
        ids = [BOS_ID, *tokenizer.encode(prompt(entry["messages"]))]
        tree = decode(reference, ids, limit)
        sequence = PathSequence()
        sequence.add([*ids, *tree.root, EOS_ID], len(ids))
        forks = [position for position, token in enumerate(tree.root) if token == FORK_ID]
        for position, detail in zip(forks, tree.details, strict=True):
            start = [*ids, *tree.root[: position + 1], CHILD_ID]
            sequence.add([*start, *detail, EOS_ID], len(start))
        batch = collate([sequence])
        hidden = states(model, batch)
        wanted = targets_of([sequence], batch.ids.shape[1], count)
        for head, (sources, tokens) in enumerate(zip(wanted.sources, wanted.tokens, strict=True)):
            guesses = model.head(heads.stacks[head](hidden[torch.tensor(sources)])).topk(RANKS).indices
            hits[head] += (guesses == torch.tensor(tokens)[:, None]).sum(0)
            totals[head] += len(tokens)
    by_rank = hits / totals[:, None]
    report: dict[str, object] = {
        "prompts": "heldout.json, greedy decoding",
        "heads": [
            {
                "offset": head + 2,
                "tokens": int(totals[head]),
                "top_1": round(float(by_rank[head, 0]), 3),
                "top_3": round(float(by_rank[head, :3].sum()), 3),
                f"top_{RANKS}": round(float(by_rank[head].sum()), 3),
                "by_rank": [round(float(share), 4) for share in by_rank[head]],
            }
            for head in range(count)
        ],
    }
    for line in report["heads"]:  # type: ignore[attr-defined]
        print(json.dumps(line))
    (folder / FOLDER / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Train Medusa heads for the tiny model, then evaluate them on the held-out prompts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of the tiny model; `medusa` is written into it")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-only", action="store_true", help="evaluate the heads that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    if not args.eval_only:
        print(f"trained in {train(args.checkpoint, args.steps, args.seed, args.rate):.0f} s", flush=True)
    evaluate(args.checkpoint)


if __name__ == "__main__":
    main()
