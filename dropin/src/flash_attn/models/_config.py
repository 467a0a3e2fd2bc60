"""Configs: what the models accept, and GPT2Config made of other families' configs."""


def is_config(config, name: str) -> bool:
    """Whether config's class or one it inherits from has this name; transformers itself is not needed to tell."""
    return any(cls.__name__ == name for cls in type(config).__mro__)


def gpt2_config(config, **fields):
    """A GPT2Config with the sizes of another family's config, and `fields`, which may replace them.

    No position embeddings and no dropout unless `fields` says so.
    """
    from transformers import GPT2Config

    common = {
        "vocab_size": config.vocab_size,
        "n_positions": 0,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if hasattr(config, "initializer_range"):
        common["initializer_range"] = config.initializer_range
    return GPT2Config(**common | fields)


def no_bias() -> dict[str, bool]:
    """Fields of a model without biases."""
    return dict.fromkeys(("qkv_proj_bias", "out_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False)


def rotary_base(config, *names: str) -> float:
    """The base of the rotary embedding, from the first of these attributes or of `rope_parameters`.

    Raises:
        NotImplementedError: the frequencies are scaled.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    scaling = getattr(config, "rope_scaling", None) or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise NotImplementedError(f"rope scaling {kind!r} is not supported; only the default rotary embedding is")
    for name in (*names, "rope_theta"):
        base = getattr(config, name, None)
        base = parameters.get(name) if base is None else base
        if base is not None:
            return float(base)
    return 10000.0


def rotary_fraction(config, *names: str) -> float:
    """The share of each head that turns, from the first of these attributes or of `rope_parameters`."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for name in names:
        fraction = getattr(config, name, None)
        fraction = parameters.get(name) if fraction is None else fraction
        if fraction is not None:
            return float(fraction)
    return 1.0


def refuse(config, **unsupported) -> None:
    """NotImplementedError for a config with one of these values."""
    for name, value in unsupported.items():
        if getattr(config, name, None) == value:
            raise NotImplementedError(f"{type(config).__name__} with {name}={value!r} is not supported")
