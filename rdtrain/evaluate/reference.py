"""A model that judges texts: any causal language model in a Hugging Face folder, or a model of ours.

It gives the NLL of each token of a text, for scores by a teacher, and the hidden state of a text's last token, for MAUVE.

Notable: a Hugging Face model reads prompt and continuation as one text with its own tokenizer, as it would meet them, and a token
counts for the continuation when its last character lies there: one that spans the boundary counts whole, the prompt's never. A
model of ours reads a text so too (by bytes), except that it takes tokens of its own tokenizer as they were written. A denoising
model's NLL is the honest one, one iteration from pure noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import UserError, first_line
from ..model.recurrent import token_losses
from ..randomness import SampleRandom
from .models import Source, find_model, is_ours


@dataclass(frozen=True)
class Passage:
    """A prompt and what follows it, as texts and as tokens of the tokenizer with this hash."""

    prompt: str
    continuation: str
    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    tokenizer_hash: str


class ReferenceModel(ABC):
    """A model on a device that reads passages in batches."""

    name: str
    device: torch.device
    context: int | None = None
    """The most tokens that it can read; None for any number."""

    @abstractmethod
    def encode(self, passage: Passage) -> tuple[list[int], list[bool]]:
        """The tokens of prompt and continuation, and which of them count for the continuation. The first never does."""

    @abstractmethod
    def _token_nll(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> Tensor:
        """Nats of tokens 1 .. of ids [B, T], fp32 [B, T - 1]; mask is false on the padding at the right."""

    @abstractmethod
    def _hidden(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> Tensor:
        """The states that the head reads, [B, T, d]."""

    @torch.no_grad()
    def nll(self, passages: Sequence[Passage], batch: int, description: str) -> list[tuple[float, int]]:
        """Of each passage's continuation: nats in all, and the number of tokens that they are of (0 for an empty one)."""
        results = []
        for ids, mask, indices, rows in self._batches(passages, batch, description):
            losses = self._token_nll(ids, mask, indices).double().cpu()
            for loss, (row, counted) in zip(losses, rows):
                here = torch.tensor(counted[1:], dtype=torch.bool)
                results.append((loss[: len(row) - 1][here].sum().item(), int(here.sum())))
        return results

    @torch.no_grad()
    def features(self, passages: Sequence[Passage], batch: int, description: str) -> Tensor:
        """The state of the last token of each prompt with its continuation, fp32 [N, d] on the CPU."""
        results = []
        for ids, mask, indices, _ in self._batches(passages, batch, description):
            hidden = self._hidden(ids, mask, indices)
            last = mask.sum(1) - 1
            results.append(hidden[torch.arange(len(ids), device=ids.device), last].float().cpu())
        return torch.cat(results)

    def _batches(self, passages: Sequence[Passage], batch: int, description: str) -> Iterator[tuple]:
        with tqdm(total=len(passages), desc=f"{description} by {self.name}", unit="text", disable=None) as progress:
            for start in range(0, len(passages), batch):
                rows = [self.encode(passage) for passage in passages[start : start + batch]]
                longest = max(2, max(len(row) for row, _ in rows))
                if self.context is not None and longest > self.context:
                    raise UserError(
                        f"a prompt with its continuation is {longest} tokens of {self.name}, which reads {self.context} at most: "
                        "lower --prompt-tokens or --new-tokens"
                    )
                ids = torch.zeros(len(rows), longest, dtype=torch.long)
                mask = torch.zeros(len(rows), longest, dtype=torch.long)
                for index, (row, _) in enumerate(rows):
                    ids[index, : len(row)] = torch.tensor(row)
                    mask[index, : max(1, len(row))] = 1  # attention of an empty text needs a place to look at
                yield ids.to(self.device), mask.to(self.device), range(start, start + len(rows)), rows
                progress.update(len(rows))


class HuggingFaceModel(ReferenceModel):
    """A folder of transformers' `save_pretrained`, with its tokenizer; nothing is fetched. It runs in the dtype it is stored in."""

    def __init__(self, folder: Path, device: torch.device, head: bool):
        """head: whether the language-model head is wanted (for NLL) or the bare model (for features). UserError when it does not load."""
        import transformers

        kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = kind.from_pretrained(folder, local_files_only=True, dtype="auto").to(device).eval()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(
                f"{folder} does not load as a Hugging Face model ({first_line(error)}): give a folder with config.json, weights and "
                "tokenizer, or a model of rdtrain"
            ) from None
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer in {folder} cannot say which characters a token covers: give a model with tokenizer.json")
        self._tokenizer = _with_whole_offsets(tokenizer.backend_tokenizer)
        self.name, self.device = folder.resolve().name, device
        self.context = getattr(self._model.config, "max_position_embeddings", None)

    def encode(self, passage: Passage) -> tuple[list[int], list[bool]]:
        encoded = self._tokenizer.encode(passage.prompt + passage.continuation)
        # Marks that the tokenizer adds end at 0.
        counted = [end > len(passage.prompt) for _, end in encoded.offsets]
        return encoded.ids, [False, *counted[1:]]

    def _token_nll(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> Tensor:
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        # Row by row: fp32 logits of a whole batch would be the largest thing in memory.
        return torch.cat([token_losses(row[None, :-1], ids[index, None, 1:]) for index, row in enumerate(logits)])

    def _hidden(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> Tensor:
        return self._model(input_ids=ids, attention_mask=mask).last_hidden_state


class RecurrentModel(ReferenceModel):
    """A model of ours. Its noise is a function of a passage's place in the list."""

    def __init__(self, source: Source, device: torch.device):
        generator = source.load(str(device))
        self.name, self.device = source.name, device
        self._model, self._tokenizer, self._objective = generator.model, generator.tokenizer, source.objective()
        self._bytes = [self._tokenizer.token_bytes(token) for token in range(self._tokenizer.vocab_size)]

    def encode(self, passage: Passage) -> tuple[list[int], list[bool]]:
        if passage.tokenizer_hash == self._tokenizer.hash:
            ids = [*passage.prompt_ids, *passage.continuation_ids]
            first = max(1, len(passage.prompt_ids))
            return ids, [place >= first for place in range(len(ids))]
        ids = self._tokenizer.encode(passage.prompt + passage.continuation, bos=True)
        ends = torch.tensor([self._bytes[token] for token in ids]).cumsum(0)
        return ids, (ends > len(passage.prompt.encode())).tolist()

    def _token_nll(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> Tensor:
        return token_losses(self._logits(ids[:, :-1], indices), ids[:, 1:])

    def _hidden(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> Tensor:
        with _inputs_of_head(self._model) as seen:
            self._logits(ids, indices)
        return seen[-1]

    def _logits(self, ids: Tensor, indices: Sequence[int]) -> Tensor:
        return self._objective.next_token_logits(self._model, ids, SampleRandom("reference", indices, self.device))


def load_reference(folder: Path, device: torch.device, head: bool) -> ReferenceModel:
    """A folder of ours (export, run or checkpoint) or of Hugging Face's. UserError when it is neither."""
    return RecurrentModel(find_model(folder), device) if is_ours(folder) else HuggingFaceModel(folder, device, head)


def _with_whole_offsets(tokenizer):
    """A copy of a fast tokenizer whose tokens' offsets cover their white space too, which byte-level ones leave out by default."""
    copy = type(tokenizer).from_str(tokenizer.to_str().replace('"trim_offsets":true', '"trim_offsets":false'))
    copy.no_truncation()
    copy.no_padding()
    return copy


@contextmanager
def _inputs_of_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of the model's last norm, in order; the last one is what the head reads."""
    seen: list[Tensor] = []
    handle = model.final_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
