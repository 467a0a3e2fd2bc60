"""BERT: attention without padding, and heads evaluated at labels only, change nothing but the work."""

import pytest
import torch
from flash_attn.models.bert import BertForPreTraining, BertModel
from tiny_models import BertConfig, assert_same, flat_gradients, make_ids, randomize

MASK = torch.arange(20) < torch.tensor([20, 11, 1, 6])[:, None]
IDS, TYPES = make_ids(4, 20), make_ids(4, 20, seed=5) % 2
LABELS = torch.where(MASK & (make_ids(4, 20, seed=6) % 3 == 0), IDS, 0)
FOLLOWS = torch.tensor([1, 0, -1, 1])
CALL = {"token_type_ids": TYPES, "attention_mask": MASK}
FUSED = {"use_flash_attn": True, "fused_bias_fc": True, "fused_dropout_add_ln": True}


def make_bert(**fields):
    torch.manual_seed(0)
    return randomize(BertForPreTraining(BertConfig(**fields)))


def pretraining_loss(model):
    return model(IDS, **CALL, labels=LABELS, next_sentence_label=FOLLOWS).loss


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_implementations_agree_forward_and_backward(hidden_act):
    plain = make_bert(hidden_act=hidden_act).double()
    fused = make_bert(hidden_act=hidden_act, fused_mlp=hidden_act != "gelu", **FUSED).double()
    for compute in (
        lambda m: m.bert(IDS, **CALL).last_hidden_state[MASK],
        lambda m: m(IDS, **CALL).prediction_logits[MASK],
        lambda m: m(IDS, **CALL).seq_relationship_logits,
        lambda m: flat_gradients(m, pretraining_loss),
    ):
        torch.testing.assert_close(compute(fused), compute(plain))


def test_padding_is_zero_and_changes_nothing():
    model = make_bert(**FUSED)
    with torch.no_grad():
        hidden = model.bert(IDS, **CALL).last_hidden_state
        assert not hidden[~MASK].any()
        other = torch.where(MASK, IDS, 7)
        assert torch.equal(model.bert(other, **CALL).last_hidden_state, hidden)
        for n, length in enumerate(MASK.sum(1)):
            alone = model.bert(IDS[n : n + 1, :length], token_type_ids=TYPES[n : n + 1, :length]).last_hidden_state
            torch.testing.assert_close(hidden[n, :length], alone[0])


@pytest.mark.parametrize("use_flash_attn", [False, True])
@pytest.mark.parametrize("last_layer_subset", [False, True])
@pytest.mark.parametrize("use_xentropy", [False, True])
def test_dense_output_has_the_same_loss(use_flash_attn, last_layer_subset, use_xentropy):
    whole = make_bert()
    fields = {"dense_seq_output": True, "last_layer_subset": last_layer_subset, "use_xentropy": use_xentropy}
    dense = make_bert(use_flash_attn=use_flash_attn, **fields)
    state_dict = dict(whole.state_dict())
    if last_layer_subset:
        for kind in ("weight", "bias"):
            prefix = "bert.encoder.layers.1.mixer."
            x = state_dict.pop(f"{prefix}Wqkv.{kind}")
            state_dict[f"{prefix}Wq.{kind}"], state_dict[f"{prefix}Wkv.{kind}"] = x.split((32, 64))
    dense.load_state_dict(state_dict)
    whole, dense = whole.double(), dense.double()
    output = dense(IDS, **CALL, labels=LABELS, next_sentence_label=FOLLOWS)
    assert output.prediction_logits.shape == ((LABELS > 0).sum(), 61)
    torch.testing.assert_close(output.prediction_logits, whole(IDS, **CALL).prediction_logits[LABELS > 0])
    torch.testing.assert_close(output.loss, pretraining_loss(whole), check_dtype=False)  # the loss is float32
    flat_gradients(dense, pretraining_loss)
    flat_gradients(whole, pretraining_loss)
    if not use_xentropy:  # whose gradient begins in float32
        for part in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layers.1.mlp.fc1.weight"):
            torch.testing.assert_close(dense.get_parameter(part).grad, whole.get_parameter(part).grad)


@pytest.mark.parametrize("fields", [{}, {"use_flash_attn": True}])
def test_chosen_tokens_that_are_padding_are_left_out(fields):
    model = make_bert(**fields).bert.double()
    chosen = make_ids(4, 20, seed=8) % 2 == 0
    whole, part = model(IDS, **CALL), model(IDS, **CALL, masked_tokens_mask=chosen)
    torch.testing.assert_close(part.last_hidden_state, whole.last_hidden_state[chosen & MASK])
    torch.testing.assert_close(part.pooler_output, whole.pooler_output)


def test_no_loss_without_both_labels():
    assert make_bert()(IDS, **CALL, labels=LABELS).loss is None


def test_rotary_positions():
    plain = make_bert(position_embedding_type="rotary", max_position_embeddings=0)
    flash = make_bert(position_embedding_type="rotary", max_position_embeddings=0, use_flash_attn=True)
    assert_same("hidden", flash.bert(IDS)[0].detach(), plain, lambda m: m.bert(IDS)[0])
    with torch.no_grad():
        shuffled = plain.bert(IDS[:, torch.randperm(20)])[0]
    assert not torch.allclose(shuffled[:, 0], plain.bert(IDS)[0][:, 0])
    with pytest.raises(AssertionError, match="rotary"):
        flash.bert(IDS, attention_mask=MASK)


def test_without_a_pooler():
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    output = model(IDS, attention_mask=MASK)
    assert output.pooler_output is None
    assert output.last_hidden_state.shape == (4, 20, 32)


def test_from_pretrained(tmp_path):
    from flash_attn.models.bert import inv_remap_state_dict

    model = make_bert()
    torch.save(inv_remap_state_dict(dict(model.state_dict()), model.config), tmp_path / "pytorch_model.bin")
    for cls, part in ((BertForPreTraining, model), (BertModel, model.bert)):
        loaded = cls.from_pretrained(str(tmp_path), model.config)
        assert all(torch.equal(x, part.state_dict()[key]) for key, x in loaded.state_dict().items())


def test_what_does_not_go_together_is_refused():
    for fields, message in (
        ({"last_layer_subset": True}, "dense_seq_output"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"fused_mlp": True}, "fused_mlp"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ):
        with pytest.raises(AssertionError, match=message):
            BertForPreTraining(BertConfig(**fields))
