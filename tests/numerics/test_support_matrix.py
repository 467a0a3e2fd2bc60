"""An engine that declares less than before would silently run fewer tests; the committed matrix makes that visible."""

import support_matrix
from serving import test_device

from flash_attn_plus import selection


def test_engines_declare_what_the_committed_matrix_says():
    assert test_device() in support_matrix.committed(), f"no matrix for {test_device()}: run {support_matrix.__file__}"
    stored, now = support_matrix.committed()[test_device()], support_matrix.matrix()
    assert stored["features"] == len(support_matrix.features())
    for name, rows in now.items():
        assert rows == stored["not served"].get(name), f"{name}: run {support_matrix.__file__}, look at the difference"


def test_the_matrix_has_every_backend():
    for device, stored in support_matrix.committed().items():
        assert {name.split()[0] for name in stored["not served"]} == set(selection.NAMES), device
