"""Every shape that numerics are tested with, by name, in three sizes.

"small" suits Triton's interpreter, "medium" the CPU, "large" a GPU. The two lengths of a size are odd and
no multiple of a tile.
"""

from itertools import product

from flash_attn_plus.testing import Case

LENGTHS = {"small": (19, 45), "medium": (113, 203), "large": (515, 1037)}
HEAD_DIMS = (1, 5, 8, 16, 40, 64, 96, 128, 192, 256, 320)


def _base(size: str) -> Case:
    short, long = LENGTHS[size]
    heads, heads_k = (4, 2) if size == "small" else (6, 2)
    return Case(batch=2, seqlen_q=short, seqlen_k=long, heads=heads, heads_k=heads_k, head_dim=32)


def _windows(short: int, long: int) -> dict[str, dict]:
    return {
        "left": {"left": short // 3},
        "right": {"right": short // 4},
        "both": {"left": short // 3, "right": short // 4},
        "zero": {"left": 0, "right": 0},
        "causal_left": {"left": short // 2, "right": 0},
        "wide": {"left": long, "right": short // 2},
    }


def dense(size: str) -> dict[str, Case]:
    """Batches of equal lengths, with gradients."""
    base, (short, long) = _base(size), LENGTHS[size]
    square, tall = base._replace(seqlen_k=short), base._replace(seqlen_q=long, seqlen_k=short)
    found = {
        "full": base,
        "full_square": square,
        "full_tall": tall,
        "causal": base._replace(right=0),
        "causal_square": square._replace(right=0),
        "causal_tall": tall._replace(right=0),
        "one_query": base._replace(seqlen_q=1, right=0),
        "one_key": base._replace(seqlen_k=1, heads=24, heads_k=12, right=0),
        "one_of_each": base._replace(seqlen_q=1, seqlen_k=1, heads=24, heads_k=12),
        "no_query": base._replace(seqlen_q=0),
        "no_key": base._replace(seqlen_k=0),
        "mha": base._replace(heads_k=base.heads, right=0),
        "mqa": base._replace(heads_k=1, right=0),
        "scale_negative": square._replace(softmax_scale=-0.3, right=0),
        "scale_zero": square._replace(softmax_scale=0.0, right=0),
        "tied_keys": base._replace(is_tied=True, right=0),
        "value_wider": base._replace(head_dim=24, head_dim_v=72, right=0),
        "value_narrower": base._replace(head_dim=96, head_dim_v=64, right=0),
        "latent_heads": base._replace(head_dim=192, head_dim_v=128),
        "softcap": base._replace(softcap=3.0),
        "softcap_causal": base._replace(softcap=15.0, right=0, q_factor=5.0),
        "alibi": square._replace(alibi="heads"),
        "alibi_batch": base._replace(alibi="batch"),
        "alibi_causal": base._replace(alibi="batch", right=0),
        "alibi_window": base._replace(alibi="heads", left=short // 2, right=3),
        "alibi_value_wider": base._replace(alibi="heads", head_dim_v=40, right=0),
        "dropout": base._replace(dropout_p=0.17),
        "dropout_causal": base._replace(dropout_p=0.5, right=0),
        "dropout_alibi_window": base._replace(dropout_p=0.3, alibi="batch", left=short // 2, right=2),
    }
    found |= {f"window_{name}": base._replace(**window) for name, window in _windows(short, long).items()}
    found |= {f"window_{name}_tall": tall._replace(**window) for name, window in _windows(short, long).items()}
    found |= {f"head_dim_{d}": square._replace(seqlen_q=short + 12, head_dim=d, right=0) for d in HEAD_DIMS}
    found["head_dim_1"] = found["head_dim_1"]._replace(heads=24, heads_k=12)  # few numbers make lucky roundings
    for layout in ("packed", "transposed", "sliced", "expanded"):
        found[f"layout_{layout}"] = base._replace(layout=layout, right=0)
    return found


def varlen(size: str) -> dict[str, Case]:
    """Packed sequences of several lengths, with gradients."""
    base, (short, long) = _base(size), LENGTHS[size]
    ragged = base._replace(lengths_q=(short, 1, long, 0, 7), lengths_k=(long, 5, short, 3, 0))
    equal = base._replace(lengths_q=(short,) * 3, lengths_k=(long,) * 3)
    return {
        "varlen": ragged,
        "varlen_causal": ragged._replace(right=0),
        "varlen_equal": equal._replace(right=0),
        "varlen_trailing": ragged._replace(trailing=5, right=0),
        "varlen_slack": ragged._replace(slack=77, right=0),
        "varlen_window": ragged._replace(left=4, right=3, trailing=2),
        "varlen_window_left": ragged._replace(left=6),
        "varlen_softcap": ragged._replace(softcap=3.0, right=0),
        "varlen_alibi": ragged._replace(alibi="batch", right=0),
        "varlen_dropout": ragged._replace(dropout_p=0.17, right=0),
        "varlen_value_wider": ragged._replace(head_dim_v=48, right=0),
        "varlen_packed": equal._replace(layout="packed"),
        "varlen_expanded": ragged._replace(layout="expanded", right=0),
    }


def cache(size: str) -> dict[str, Case]:
    """Keys that lie in a cache: partly used, left-padded or paged; forward only."""
    base, (short, long) = _base(size), LENGTHS[size]
    batch = base._replace(batch=4, used=(long, 0, 1, short))
    decode = batch._replace(seqlen_q=1)
    found = {
        "used": batch,
        "used_causal": batch._replace(right=0),
        "used_window": batch._replace(left=5, right=0),
        "used_packed": base._replace(lengths_q=(short, 4), lengths_k=(long, 6), used=(short, 6), right=0),
        "used_beside_packed_q": base._replace(lengths_q=(short, 4), used=(long, 9), right=0),
        "leftpad": batch._replace(leftpad=(4, 0, 1, 2), right=0),
        "leftpad_alibi": batch._replace(leftpad=(4, 0, 1, 2), alibi="batch", right=0),
        "leftpad_packed": base._replace(lengths_q=(short, 4), lengths_k=(long, 6), leftpad=(3, 6), right=0),
        "decode": decode._replace(layout="packed"),
        "decode_window": decode._replace(left=6, right=0),
        "paged_softcap": batch._replace(page_size=16, softcap=3.0, right=0),
        "paged_alibi": batch._replace(page_size=16, alibi="heads", right=0),
        "paged_dropout": batch._replace(page_size=16, dropout_p=0.17, right=0),
        "paged_window": batch._replace(page_size=16, left=7, right=0),
        "paged_sliced": decode._replace(page_size=16, layout="sliced"),
        "paged_varlen": base._replace(
            seqlen_k=long, lengths_q=(short, 1, 3), lengths_k=(long, short, 1), page_size=16, right=0
        ),
    }
    found |= {f"paged_{page}": batch._replace(page_size=page, right=0) for page in (1, 16, 19, 256)}
    found |= {f"paged_decode_{page}": decode._replace(page_size=page) for page in (1, 19, 256)}
    return found


def crossed(size: str) -> dict[str, Case]:
    """Every band with every score rule, sequence form, value width and head grouping; a third of them but on a GPU."""
    base, (short, long) = _base(size), LENGTHS[size]
    bands = {"full": {}, "causal": {"right": 0}} | _windows(short, long)
    rules = {
        "plain": {},
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi": "batch"},
        "alibi_softcap": {"alibi": "heads", "softcap": 3.0},
        "dropout": {"dropout_p": 0.17},
    }
    forms = {"wide": {}, "tall": {"seqlen_q": long, "seqlen_k": short}, "varlen": {}}
    forms["varlen"] = {"lengths_q": (short, 0, 9, long), "lengths_k": (long, 4, 0, short)}
    shapes = {"gqa": {}, "mha_d48_dv80": {"heads_k": base.heads, "head_dim": 48, "head_dim_v": 80}}
    every = product(bands.items(), rules.items(), forms.items(), shapes.items())
    found = {
        "-".join(name for name, _ in options): base._replace(**{k: v for _, o in options for k, v in o.items()})
        for options in every
    }
    step = {"small": 11, "medium": 3, "large": 1}[size]
    return dict(list(found.items())[::step])


def large_logits(size: str) -> dict[str, Case]:
    """Scores up to some thousands; the products before the scale still fit float16."""
    base, (short, _) = _base(size)._replace(heads=8, heads_k=4), LENGTHS[size]
    return {
        "large_logits": base._replace(q_factor=1000.0),
        "large_logits_causal": base._replace(seqlen_k=short, q_factor=1000.0, right=0),
    }
