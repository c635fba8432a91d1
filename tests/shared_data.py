"""Where the shared data lies (UNDERSTUDY_DATA, default ../shared/data), and how a test that needs it says it is not there."""

import os
import pathlib

DATA = pathlib.Path(os.environ.get("UNDERSTUDY_DATA", pathlib.Path(__file__).parents[1] / "../shared/data"))
NO_DATA = "shared data not found"
"""Reason of the skip; the summary of a test run counts these."""
