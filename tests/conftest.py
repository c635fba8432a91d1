"""Counts the tests that were skipped for want of the shared data (UNDERSTUDY_DATA, default ../shared/data)."""

from shared_data import NO_DATA


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_DATA in str(report.longrepr)]
    terminalreporter.write_line(f"skipped for want of shared data: {len(skipped)}")
