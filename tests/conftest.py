"""What all tests share: how many examples properties get, and the count of tests skipped for want of the shared data.

HYPOTHESIS_PROFILE=deep gives every property that names no number of its own 2,000 examples instead of 50. No example has
a deadline: on a busy machine it would measure the neighbours.
"""

import os

import pytest
from hypothesis import settings
from shared_data import NO_DATA

settings.register_profile("quick", max_examples=50, deadline=None)
settings.register_profile("deep", max_examples=2_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Their assertions then say what differs, as those of tests do.
pytest.register_assert_rewrite("fakes", "foreign_logs")


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_DATA in str(report.longrepr)]
    terminalreporter.write_line(f"skipped for want of shared data: {len(skipped)}")
