"""Serial embeddings; the parallel ones are checked with two processes beside the models."""

import torch
from flash_attn.modules.embedding import BertEmbeddings, GPT2Embeddings, VocabParallelEmbedding

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def test_gpt2():
    module = GPT2Embeddings(8, 10, 6)
    words, positions = module.word_embeddings.weight, module.position_embeddings.weight
    torch.testing.assert_close(module(IDS), words[IDS] + positions[:3])
    places = torch.tensor([[2, 3, 4], [0, 0, 5]])
    torch.testing.assert_close(module(IDS, position_ids=places), words[IDS] + positions[places])
    assert set(module.state_dict()) == {"word_embeddings.weight", "position_embeddings.weight"}


def test_gpt2_without_positions_and_with_narrow_words():
    module = GPT2Embeddings(8, 10, 0, word_embed_proj_dim=4)
    torch.testing.assert_close(module(IDS), module.word_embeddings.weight[IDS] @ module.project_in.weight.T)
    assert set(module.state_dict()) == {"word_embeddings.weight", "project_in.weight"}


def test_bert():
    module = BertEmbeddings(8, 10, 6, 2, padding_idx=0)
    words, positions = module.word_embeddings.weight, module.position_embeddings.weight
    types = module.token_type_embeddings.weight
    torch.testing.assert_close(module(IDS), words[IDS] + positions[:3] + types[0])
    kinds = torch.tensor([[0, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(module(IDS, token_type_ids=kinds), words[IDS] + positions[:3] + types[kinds])
    assert not words[0].any()
    assert set(BertEmbeddings(8, 10, 0, 0).state_dict()) == {"word_embeddings.weight"}


def test_without_a_group_everything_is_here():
    module = VocabParallelEmbedding(10, 4)
    torch.testing.assert_close(module(IDS), module.weight[IDS])
