"""Asserts in the shipped suite are rewritten as those of the tests here are."""

import pytest

pytest.register_assert_rewrite("snapshotter.testing.conformance")
