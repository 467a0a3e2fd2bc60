"""A backend that declares less than before would silently run fewer tests; the committed matrix makes that visible."""

import support_matrix
from serving import test_device


def test_backends_declare_what_the_committed_matrix_says():
    stored = support_matrix.committed()
    assert test_device() in stored, f"no matrix for {test_device()}: run {support_matrix.__file__}"
    now = {"features": len(support_matrix.features()), "not served": support_matrix.matrix()}
    assert now == stored[test_device()], f"run {support_matrix.__file__} and look at the difference"
