"""The support matrix in a few lines, from tests/numerics/support_matrix.json: what each backend serves on an H200."""

import json
from typing import Any

from tools.results import ROOT

PATH = ROOT / "tests" / "numerics" / "support_matrix.json"
BACKENDS = ("gluon", "triton", "cuda", "flaggems", "torch")

# A line of the matrix, in English and Chinese -> dtype, and the tested cases that stand for it.
LINES: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("full and causal", "全部可见与因果"): ("bfloat16", ("full", "full_square", "causal", "causal_square")),
    ("sliding windows", "滑动窗口"): ("bfloat16", ("window_left", "window_both", "window_causal_left")),
    ("MQA and GQA", "MQA 与 GQA"): ("bfloat16", ("mqa", "long_full_128", "long_causal_64")),
    ("packed sequences (`varlen`)", "打包的变长序列 (`varlen`)"): (
        "bfloat16",
        ("varlen", "varlen_causal", "varlen_equal", "long_varlen_causal_64", "long_varlen_causal_128"),
    ),
    ("softcap", "softcap"): ("bfloat16", ("softcap", "softcap_causal", "varlen_softcap")),
    ("ALiBi", "ALiBi"): ("bfloat16", ("alibi", "alibi_causal", "alibi_batch", "varlen_alibi")),
    ("dropout", "dropout"): ("bfloat16", ("dropout", "dropout_causal", "varlen_dropout")),
    ("values of another head dim", "V 的 head dim 与 Q/K 不同"): (
        "bfloat16",
        ("value_wider", "value_narrower", "latent_heads"),
    ),
    ("head dim 256", "head dim 256"): ("bfloat16", ("head_dim_256", "long_full_256", "long_causal_256")),
    ("head dim 512", "head dim 512"): ("bfloat16", ("head_dim_512",)),
    ("paged keys", "分页的 K/V"): ("bfloat16", ("paged_1", "paged_16", "paged_256", "paged_varlen")),
    ("partly used, left-padded caches", "部分使用、左填充的缓存"): ("bfloat16", ("used_causal", "leftpad")),
    ("float32", "float32"): ("float32", ("full", "causal", "varlen", "window_both")),
    ("float64", "float64"): ("float64", ("full", "causal", "varlen", "window_both")),
}
FORWARD_ONLY = ("paged", "used", "leftpad")
WORDS = {
    "en": {"both": "yes", "forward": "forward", "some": "some", "none": "-"},
    "zh": {"both": "是", "forward": "前向", "some": "部分", "none": "-"},
}
HEADINGS = {"en": "on an H200", "zh": "H200 上"}


def _refused(stored: dict[str, Any], backend: str, direction: str, dtype: str, case: str) -> bool:
    """Whether none of the backend's engines serves the case."""
    engines = [name for name in stored if name.split()[0] == backend]
    told = (stored[name][direction][dtype] for name in engines)
    return all(text == "everything" or case in text.split() for text in told)


def verdict(stored: dict[str, Any], backend: str, dtype: str, cases: tuple[str, ...]) -> str:
    """ "both" passes, "forward", "some" of the cases in the forward pass, or "none"."""
    refused = [_refused(stored, backend, "forward", dtype, case) for case in cases]
    if all(refused):
        return "none"
    if any(refused):
        return "some"
    with_backward = [case for case in cases if not case.startswith(FORWARD_ONLY)]
    is_complete = not any(_refused(stored, backend, "backward", dtype, case) for case in with_backward)
    return "both" if with_backward and is_complete else "forward"


def table(language: str = "en") -> list[str]:
    """The matrix in Markdown."""
    stored = json.loads(PATH.read_text(encoding="utf-8"))["cuda"]["not served"]
    lines = [f"| {HEADINGS[language]} | {' | '.join(f'`{name}`' for name in BACKENDS)} |", "| --- |" + " --- |" * 5]
    for names, (dtype, cases) in LINES.items():
        words = [WORDS[language][verdict(stored, backend, dtype, cases)] for backend in BACKENDS]
        lines.append(f"| {names[language == 'zh']} | {' | '.join(words)} |")
    return lines
