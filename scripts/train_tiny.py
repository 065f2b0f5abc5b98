"""Train and evaluate the tiny APAR model on a CPU.

A conversation's rows (main and details) share most of their tokens. They are merged into one sequence whose attention
mask lets every token see exactly its own path, with positions counted along the path: the same loss as row by row, at a
fraction of the tokens. Several conversations share one sequence in the same way: they have the system prompt in common.

Two processes of one thread each take half of every batch. On a small model that wastes less than two threads that wait
for each other in every operation, above all on a machine that does other work at the same time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_corpus import CHILD, EOS, FORK, SYSTEM, Conversation, Corpus, prompt
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 4, 4, 2, 64
POSITIONS, NORM_EPS, ROPE_THETA = 1024, 1e-6, 10000.0
BASE_VOCABULARY = 2048
BOS_ID, EOS_ID, FORK_ID, CHILD_ID = 1, 2, BASE_VOCABULARY, BASE_VOCABULARY + 1
SEQUENCE, BATCH = 320, 8
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "rms_norm_eps": NORM_EPS,
    "rope_scaling": None,
    "rope_theta": ROPE_THETA,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": BASE_VOCABULARY + 2,
}


# ---------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """The base SentencePiece tokenizer, applied to each stretch of text between control tokens on its own."""

    _CONTROL: ClassVar[dict[str, int]] = {FORK: FORK_ID, CHILD: CHILD_ID, EOS: EOS_ID}
    _STRETCHES = re.compile("(" + "|".join(re.escape(text) for text in _CONTROL) + ")")

    def __init__(self, model: bytes) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text with control strings; every stretch gets the dummy prefix. No BOS."""
        ids: list[int] = []
        for part in self._STRETCHES.split(text):
            if part:
                ids += [self._CONTROL[part]] if part in self._CONTROL else self.pieces.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of one stretch, without the dummy prefix."""
        return self.pieces.decode(ids)


def train_tokenizer(corpus: Corpus, seed: int) -> bytes:
    """Train the SentencePiece model (BPE with byte fallback, set up like Llama's) on the corpus."""
    lines: list[str] = []
    for conversation in islice(corpus.train(seed), 6000):
        for text in (prompt(conversation.messages()), conversation.turns[-1].answer.assembled()):
            lines += [line for line in text.replace(SYSTEM, "").replace(EOS, "\n").split("\n") if line.strip()]
    lines += [SYSTEM] * 200
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=BASE_VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        required_chars="".join(map(chr, range(33, 127))),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_json(model: bytes) -> dict[str, object]:
    """The same tokenizer in the format of the ``tokenizers`` library: merges follow from the order of the pieces."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges: list[tuple[int, int, int, list[str]]] = []
    for piece, number in vocabulary.items():
        if pieces.is_byte(number) or pieces.is_control(number) or pieces.is_unknown(number):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((number, vocabulary[left], vocabulary[right], [left, right]))
    merges.sort(key=lambda merge: merge[:3])

    def added(number: int, content: str, special: bool) -> dict[str, object]:
        return {
            "id": number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added(0, "<unk>", True),
            added(1, "<s>", True),
            added(2, "</s>", True),
            added(FORK_ID, FORK, False),
            added(CHILD_ID, CHILD, False),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [merge[3] for merge in merges],
        },
    }


def write_tokenizer(model: bytes, folder: Path) -> None:
    """Write every tokenizer file of the checkpoint."""

    def dump(name: str, data: object) -> None:
        (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def token(content: str, special: bool) -> dict[str, object]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }

    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer_json(model), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    dump("added_tokens.json", {CHILD: CHILD_ID, FORK: FORK_ID})
    dump(
        "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    )
    dump(
        "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                "0": token("<unk>", True),
                "1": token("<s>", True),
                "2": token("</s>", True),
                str(FORK_ID): token(FORK, False),
                str(CHILD_ID): token(CHILD, False),
            },
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "legacy": True,
            "model_max_length": POSITIONS,
            "pad_token": "<unk>",
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )


# ------------------------------------------------------------------------------------------------------ batches


@dataclass(slots=True)
class Sequence:
    """Rows merged by their common beginnings: a tree of tokens, flattened parents first."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    targets: list[tuple[int, int]] = field(default_factory=list)  # (index of a token, id that follows it)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, row: list[int], learn_from: int) -> None:
        """Add a row; tokens from position ``learn_from`` on are targets."""
        parent = -1
        for position, token in enumerate(row):
            if position >= learn_from:
                self.targets.append((parent, token))
            if position == len(row) - 1:
                return  # the last token is only a target
            child = self._children.get((parent, token))
            if child is None:
                child = len(self.ids)
                self.ids.append(token)
                self.parents.append(parent)
                self._children[parent, token] = child
            parent = child


def add_conversation(sequence: Sequence, conversation: Conversation, tokenizer: Tokenizer) -> None:
    """Add all rows of a conversation; only answers are learned, and of a detail's row only the detail."""
    start = prompt(conversation.messages())
    for row in conversation.rows():
        ids = [BOS_ID, *tokenizer.encode(start + row)]
        if CHILD_ID in ids:
            sequence.add(ids, ids.index(CHILD_ID) + 1)
        else:
            sequence.add(ids, len(tokenizer.encode(start)) + 1)


def sequences(corpus: Corpus, tokenizer: Tokenizer, seed: int, length: int) -> Iterator[Sequence]:
    """Endless training sequences of at most ``length`` tokens."""
    current = Sequence()
    for conversation in corpus.train(seed):
        alone = Sequence()
        add_conversation(alone, conversation, tokenizer)
        if current.ids and len(current.ids) + len(alone.ids) > length:
            yield current
            current = Sequence()
        if len(alone.ids) <= length:
            add_conversation(current, conversation, tokenizer)


@dataclass(slots=True)
class Batch:
    """Tensors of some sequences: ids and positions [B, T], mask [B, 1, T, T], targets as flat indices and ids."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    sources: Tensor
    targets: Tensor


def collate(group: Collection[Sequence]) -> Batch:
    """Pad sequences to the longest and build what the model needs."""
    length = max(len(sequence.ids) for sequence in group)
    ids = np.zeros((len(group), length), np.int64)
    mask = np.broadcast_to(np.eye(length, dtype=np.bool_), (len(group), length, length)).copy()
    sources: list[int] = []
    targets: list[int] = []
    for row, sequence in enumerate(group):
        ids[row, : len(sequence.ids)] = sequence.ids
        seen = mask[row]
        for index, parent in enumerate(sequence.parents):
            if parent >= 0:
                seen[index] |= seen[parent]
        sources += [row * length + index for index, _ in sequence.targets]
        targets += [token for _, token in sequence.targets]
    visible = torch.from_numpy(mask)
    positions = visible.sum(-1) - 1
    return Batch(torch.from_numpy(ids), positions, visible[:, None], torch.tensor(sources), torch.tensor(targets))


# -------------------------------------------------------------------------------------------------------- model


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Layer(nn.Module):
    """One Llama decoder layer with fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.attention_norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.mlp_norm = nn.RMSNorm(HIDDEN, NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
        query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        group = HEADS // KV_HEADS
        attended = F.scaled_dot_product_attention(
            _rotate(query, cos, sin),
            _rotate(key, cos, sin).repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=mask,
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """The Llama decoder, computing logits only where they are learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BASE_VOCABULARY + 2, HIDDEN)
        self.blocks = [Layer() for _ in range(LAYERS)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.head = nn.Linear(HIDDEN, BASE_VOCABULARY + 2, bias=False)
        frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
        angles = torch.outer(torch.arange(POSITIONS, dtype=torch.float32), frequencies)
        self.cos, self.sin = angles.cos(), angles.sin()
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.6 * HIDDEN**-0.5 * ((2 * LAYERS) ** -0.5 if residual else 1.0))

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross entropy over the batch's targets."""
        cos, sin = self.cos[batch.positions][:, None], self.sin[batch.positions][:, None]
        x = self.embedding(batch.ids)
        for layer in self.blocks:
            x = layer(x, batch.mask, cos, sin)
        x = x.flatten(0, 1)[batch.sources]
        return F.cross_entropy(self.head(self.norm(x)), batch.targets)

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights under the names of ``LlamaForCausalLM``, float16."""
        weights: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding.weight,
            "model.norm.weight": self.norm.weight,
            "lm_head.weight": self.head.weight,
        }
        for number, layer in enumerate(self.blocks):
            name = f"model.layers.{number}."
            query, key, value = layer.qkv.weight.split([n * HEAD_DIM for n in (HEADS, KV_HEADS, KV_HEADS)])
            gate, up = layer.gate_up.weight.chunk(2)
            weights |= {
                f"{name}self_attn.q_proj.weight": query,
                f"{name}self_attn.k_proj.weight": key,
                f"{name}self_attn.v_proj.weight": value,
                f"{name}self_attn.o_proj.weight": layer.out.weight,
                f"{name}mlp.gate_proj.weight": gate,
                f"{name}mlp.up_proj.weight": up,
                f"{name}mlp.down_proj.weight": layer.down.weight,
                f"{name}input_layernorm.weight": layer.attention_norm.weight,
                f"{name}post_attention_layernorm.weight": layer.mlp_norm.weight,
            }
        return {name: weight.detach().to(torch.float16).contiguous().clone() for name, weight in weights.items()}


def save(model: Model, folder: Path) -> None:
    """Write weights and configuration; a reader never sees half a file."""
    temporary = folder / "model.safetensors.part"
    save_file(model.checkpoint(), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by the Newton-Schulz iteration of the Muon optimizer."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon:
    """Muon (Nesterov momentum, orthogonalised) for the layers' matrices; every process computes its share of them."""

    def __init__(
        self, weights: list[Tensor], rank: int, world: int, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        self.weights, self.momentum, self.decay = weights, momentum, decay
        self.mine = [number % world == rank for number in range(len(weights))]
        self.velocity = [torch.zeros_like(weight) for weight in weights]
        self.world = world

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights; an update's root mean square is 0.2 times the rate, as AdamW's would be."""
        updates: list[Tensor] = []
        for weight, velocity, mine in zip(self.weights, self.velocity, self.mine, strict=True):
            assert weight.grad is not None
            velocity.lerp_(weight.grad, 1 - self.momentum)
            if mine:
                update = orthogonalised(weight.grad.lerp(velocity, self.momentum))
                updates.append(update * (0.2 * math.sqrt(max(weight.shape))))
            else:
                updates.append(torch.zeros_like(weight))
        flat = torch.cat([update.flatten() for update in updates])
        if self.world > 1:
            dist.all_reduce(flat)
        for weight, update in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
            weight.mul_(1 - rate * self.decay).sub_(update.view_as(weight), alpha=rate)


def share_gradients(model: Model, world: int) -> None:
    """Average the gradients of all processes."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def work(rank: int, world: int, folder: Path, rendezvous: str, steps: int, seed: int, rate: float) -> None:
    """One training process; process 0 reports and saves."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    torch.manual_seed(seed)
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    model = Model()
    muon = Muon([weight for weight in model.layers.parameters() if weight.dim() == 2], rank, world)
    rest = [model.embedding.weight, model.head.weight, *(w for w in model.parameters() if w.dim() < 2)]
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    stream = sequences(Corpus(), tokenizer, seed, SEQUENCE)
    warmup = max(1, steps // 30)
    started = said = saved = time.monotonic()
    tokens, losses = 0, []
    for step in range(1, steps + 1):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        now = rate * min(step / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        adam.param_groups[0]["lr"] = now
        batch = collate(list(islice(stream, BATCH))[rank::world])
        loss = model(batch)
        loss.backward()
        share_gradients(model, world)
        muon.step(now)
        adam.step()
        model.zero_grad(set_to_none=True)
        tokens += batch.ids.numel() * world
        losses.append(loss.item())
        if rank:
            continue
        if time.monotonic() - said > 5 or step == steps:
            said = time.monotonic()
            recent = losses[-10:]
            print(
                f"step {step}/{steps} loss {sum(recent) / len(recent):.4f} {tokens / (said - started):.0f} tokens/s "
                f"eta {(said - started) / step * (steps - step):.0f} s",
                flush=True,
            )
        if time.monotonic() - saved > 120 or step == steps:
            save(model, folder)
            saved = time.monotonic()
    if world > 1:
        dist.destroy_process_group()


def train(folder: Path, steps: int, seed: int, rate: float = 3e-3, world: int = 2) -> float:
    """Train from scratch into ``folder``; the seconds it took."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus()
    write_tokenizer(train_tokenizer(corpus, seed), folder)
    (folder / "heldout.json").write_text(json.dumps(corpus.held_out(), indent=1, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        spawn(work, (world, folder, f"{temporary}/rendezvous", steps, seed, rate), nprocs=world)
    return time.monotonic() - began


# --------------------------------------------------------------------------------------------------- evaluation


@dataclass(slots=True)
class Tree:
    """A decoded tree of depth two: the root's tokens and its details by fork, without EOS.

    ``ended``: every branch ended by itself and none is empty. ``sampled`` counts tokens with EOS, ``steps`` the steps
    they take when all branches advance together.
    """

    root: list[int]
    details: list[list[int]]
    ended: bool
    sampled: int
    steps: int

    def assembled(self, tokenizer: Tokenizer) -> str:
        """The text a reader sees, by the assembly rule of the runtime."""
        stretches: list[list[int]] = [[]]
        for token in self.root:
            if token == FORK_ID:
                stretches.append([])
            else:
                stretches[-1].append(token)
        text = ""
        for number, stretch in enumerate(stretches):
            piece = tokenizer.decode(stretch)
            if piece and text and not piece.startswith("\n\n"):
                piece = "\n\n" + piece.lstrip("\n")
            text += piece
            if number < len(self.details):
                detail = tokenizer.decode(self.details[number])
                if detail and not detail.startswith("\n"):
                    detail = ("\n" if re.search(r"\d+\. ", piece) else " ") + detail
                text += detail
        return text


def decode(model: nn.Module, ids: list[int], limit: int) -> Tree:
    """Greedy decoding of a whole tree with a key-value cache; steps count as if branches advanced together."""
    from transformers import DynamicCache

    def run(path: list[int], cache: object, may_fork: bool, keep: int) -> tuple[list[int], bool]:
        """Continue a path of which ``keep`` tokens are cached; the tokens sampled and whether EOS came."""
        sampled: list[int] = []
        pending = path[keep:]
        last = path[-1]
        while len(sampled) < limit:
            logits = model(input_ids=torch.tensor([pending]), past_key_values=cache, use_cache=True).logits[0, -1]
            logits[CHILD_ID] = -math.inf
            if not may_fork or last in (FORK_ID, CHILD_ID):
                logits[FORK_ID] = -math.inf
            last = int(logits.argmax())
            if last == EOS_ID:
                return sampled, True
            sampled.append(last)
            pending = [last]
        return sampled, False

    cache = DynamicCache()
    root, ended = run(ids, cache, True, 0)
    sampled = steps = len(root) + ended
    details: list[list[int]] = []
    forks = [position for position, token in enumerate(root) if token == FORK_ID]
    for position in reversed(forks):
        if cache.get_seq_length() > len(ids) + position:
            cache.crop(len(ids) + position - cache.get_seq_length())
        detail, detail_ended = run([*ids, *root[: position + 1], CHILD_ID], cache, False, len(ids) + position)
        details.insert(0, detail)
        ended = ended and detail_ended and bool(detail)
        sampled += len(detail) + detail_ended
        steps = max(steps, position + 1 + len(detail) + detail_ended)
    return Tree(root, details, ended, sampled, steps)


def evaluate(folder: Path, limit: int = 400) -> dict[str, object]:
    """Decode every held-out prompt greedily; the figures by category and over all. Writes ``evaluation.json``."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    groups: dict[str, list[dict[str, float]]] = {}
    wrong: list[dict[str, str]] = []
    entries = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        for number, entry in enumerate(entries):
            tree = decode(model, [BOS_ID, *tokenizer.encode(prompt(entry["messages"]))], limit)
            text = tree.assembled(tokenizer)
            result = {
                "fork_decision": float(bool(tree.details) == bool(entry["forks"])),
                "branch_count": float(len(tree.details) == entry["forks"]),
                "well_formed": float(tree.ended),
                "exact": float(text == entry["expected"]),
                "tokens": float(tree.sampled),
                "steps": float(tree.steps),
            }
            if text != entry["expected"]:
                wrong.append({"id": entry["id"], "got": text})
            for name in (entry["category"], "all", *(["forked"] if tree.details else [])):
                groups.setdefault(name, []).append(result)
            print(f"{number + 1}/{len(entries)} {entry['id']} exact={result['exact']:.0f}", flush=True)
    figures: dict[str, object] = {}
    for name, results in groups.items():
        means = {key: round(sum(r[key] for r in results) / len(results), 3) for key in results[0]}
        total = {key: sum(r[key] for r in results) for key in ("tokens", "steps")}
        figures[name] = {
            "prompts": len(results),
            **means,
            "tokens_per_step": round(total["tokens"] / total["steps"], 3),
        }
        print(name, json.dumps(figures[name]))
    report = {"figures": figures, "wrong": wrong}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def main() -> None:
    """Train the tiny model, then evaluate it on the held-out prompts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, help="folder of the checkpoint to write")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus-out", type=Path, help="also write 1000 training conversations as APAR rows (JSON)")
    parser.add_argument("--eval-only", type=Path, help="evaluate this checkpoint and do not train")
    args = parser.parse_args()
    if args.output is None and args.eval_only is None:
        parser.error("give --output or --eval-only")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    if args.corpus_out:
        from tiny_corpus import as_apar_format

        conversations = islice(Corpus().train(args.seed), 1000)
        rows = [row for index, conversation in enumerate(conversations) for row in as_apar_format(conversation, index)]
        args.corpus_out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.eval_only is None:
        print(f"trained in {train(args.output, args.steps, args.seed):.0f} s", flush=True)
    evaluate(args.eval_only or args.output)


if __name__ == "__main__":
    main()
