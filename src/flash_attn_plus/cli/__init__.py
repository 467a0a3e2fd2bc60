"""The command flash-attn-plus; nothing in the engine imports it."""
