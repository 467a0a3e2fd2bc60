"""python -m flash_attn_plus: the same as the command flash-attn-plus."""

from flash_attn_plus.cli.main import main

if __name__ == "__main__":  # processes that compile import this module again
    raise SystemExit(main())
