"""Cases of a test that `make test-all` has and `make test` leaves out."""

import pytest


def thorough(*values):
    """A case of a parametrized test: another one holds the same law in `make test`."""
    return pytest.param(*values, marks=pytest.mark.thorough)
