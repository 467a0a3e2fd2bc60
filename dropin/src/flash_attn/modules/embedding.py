"""Token, position and type embeddings, serial and tensor-parallel."""

import torch
from einops import rearrange
from torch import nn

from flash_attn.utils.distributed import all_reduce, reduce_scatter


def _positions(input_ids, position_ids):
    """(s,) counted from 0 unless given."""
    if position_ids is not None:
        return position_ids
    return torch.arange(input_ids.shape[1], dtype=torch.long, device=input_ids.device)


class GPT2Embeddings(nn.Module):
    """Word plus learned position embeddings.

    Args:
        max_position_embeddings: 0 for none.
        word_embed_proj_dim: width of the word embeddings when it is not embed_dim; `project_in` widens them.
    """

    def __init__(
        self, embed_dim, vocab_size, max_position_embeddings, padding_idx=None, word_embed_proj_dim=None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        word_dim = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, word_dim, padding_idx=padding_idx, **factory)
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(word_embed_proj_dim, embed_dim, bias=False, **factory)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)

    def forward(self, input_ids, position_ids=None):
        """input_ids and position_ids (b, s) -> (b, s, embed_dim)."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        return embeddings


class BertEmbeddings(nn.Module):
    """Word plus position plus token-type embeddings; the last two are absent when their number is 0."""

    def __init__(
        self, embed_dim, vocab_size, max_position_embeddings, type_vocab_size, padding_idx=None, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **factory)
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **factory)

    def forward(self, input_ids, position_ids=None, token_type_ids=None):
        """Three (b, s) -> (b, s, embed_dim); the types default to 0."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        if self.type_vocab_size > 0:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            embeddings = embeddings + self.token_type_embeddings(types)
        return embeddings


def _share(size, process_group, what):
    world = 1 if process_group is None else process_group.size()
    if size % world:
        raise ValueError(f"{what} ({size}) must be divisible by the {world} ranks of the process group")
    return size // world


class VocabParallelEmbedding(nn.Embedding):
    """This rank's share of the rows; tokens of other ranks give zeros, so that a sum over ranks is the embedding.

    Raises:
        ValueError: num_embeddings is not divisible by the number of ranks.
        RuntimeError: padding_idx with more than one rank.
    """

    def __init__(self, num_embeddings, *args, process_group=None, padding_idx=None, **kwargs):
        self.process_group = process_group
        if process_group is not None and process_group.size() > 1 and padding_idx is not None:
            raise RuntimeError("padding_idx is not supported when the vocabulary is spread over ranks")
        share = _share(num_embeddings, process_group, "num_embeddings")
        super().__init__(share, *args, padding_idx=padding_idx, **kwargs)

    def forward(self, input):
        """(...) ids of the whole vocabulary -> (..., embedding_dim)."""
        if self.process_group is None:
            return super().forward(input)
        own = input - self.process_group.rank() * self.num_embeddings
        is_foreign = (own < 0) | (own >= self.num_embeddings)
        embeddings = super().forward(own.masked_fill(is_foreign, 0))
        return embeddings.masked_fill(is_foreign.unsqueeze(-1), 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """This rank's share of the columns.

    Raises:
        ValueError: embedding_dim is not divisible by the number of ranks.
    """

    def __init__(self, num_embeddings, embedding_dim, *args, process_group=None, **kwargs):
        self.process_group = process_group
        super().__init__(num_embeddings, _share(embedding_dim, process_group, "embedding_dim"), *args, **kwargs)


class ParallelGPT2Embeddings(nn.Module):
    """`GPT2Embeddings` with words split by rows and positions by columns."""

    def __init__(
        self, embed_dim, vocab_size, max_position_embeddings, process_group, padding_idx=None, sequence_parallel=True,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, embed_dim, padding_idx=padding_idx, process_group=process_group, **factory
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, process_group=process_group, **factory
            )

    def forward(self, input_ids, position_ids=None, combine_batch_seqlen_dim=False):
        """Ids (b, s), the same on every rank -> (b, s, embed_dim), or (b * s, embed_dim) if the two are combined.

        A sequence-parallel rank gets its share of the first dimension.
        """
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            positions = self.position_embeddings(_positions(input_ids, position_ids))
            width = positions.shape[-1]
            before = 0 if self.process_group is None else self.process_group.rank() * width
            after = embeddings.shape[-1] - before - width
            embeddings = embeddings + nn.functional.pad(positions, (before, after))
        if combine_batch_seqlen_dim:
            embeddings = rearrange(embeddings, "b s d -> (b s) d")
        if self.process_group is None or self.process_group.size() == 1:
            return embeddings
        return (reduce_scatter if self.sequence_parallel else all_reduce)(embeddings, self.process_group)
