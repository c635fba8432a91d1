"""TRACER's gate (tracer-llm 0.3.3) on the draws that ours is measured on, in a Python of its own.

It needs other versions than ours (numpy below 2.1), so it is run by the interpreter that UNDERSTUDY_TRACER_PYTHON names, else
of an environment that is made for it (jobs/bench/peers.py). Only its threshold search is taken
(`tracer.fit.pipeline._calibrate_threshold`, defaults): it gets validation and calibration draw together, the same scores,
and what ours would call agreement. Its own pipeline also fits the classifier, which is not compared here.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from jobs.bench.gate_pools import Pool
from jobs.bench.peers import install_peer

PYTHON_ENV = "UNDERSTUDY_TRACER_PYTHON"
VERSION = "0.3.3"
NUM_RESAMPLES = 50
"""Its search takes a fraction of a second for each."""
_SCRIPT = """
import json, sys
import numpy as np
from tracer.fit.pipeline import _calibrate_threshold
given = np.load(sys.argv[1])
found = []
for draw in given["draws"]:
    answers, classes = given["answers"][draw], given["classes"][draw]
    gate = _calibrate_threshold(given["confidences"][draw], answers, classes, 1 - float(given["epsilon"]))
    found.append(None if gate is None else gate["threshold"])
print(json.dumps(found))
"""


def find_tracer(say: Callable[[str], object]) -> str | None:
    """The interpreter that has tracer-llm, or None with a word about why it cannot be had.

    Raises:
        ConfigError: the one that is named has it not.
    """
    python = os.environ.get(PYTHON_ENV)
    if not python:
        home = install_peer("tracer", VERSION, f"tracer-llm=={VERSION}", say)
        return home and str(home / "bin" / "python")
    try:
        subprocess.run([python, "-c", "import tracer.fit.pipeline"], check=True, capture_output=True, cwd="/")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"{PYTHON_ENV}={python}: cannot import tracer ({type(error).__name__}); next: {python} -m pip install tracer-llm==0.3.3"
        ) from None
    return python


def measure_tracer(
    python: str, pool: Pool, epsilon: float, num_drawn: int, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Any]:
    """Mean coverage of its thresholds in the pool, and the share of them whose true risk is above epsilon."""
    # Wrong answers of one class, where the pool has no classes: it splits by class.
    answers = pool.answers if pool.classes.any() else (~pool.agrees).astype(int)
    draws = [
        np.random.default_rng([seed, round(1 / epsilon)]).integers(0, len(pool.agrees), num_drawn)
        for seed in range(num_resamples)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "draws.npz"
        np.savez(
            path,
            draws=np.stack(draws),
            confidences=pool.confidences,
            answers=answers,
            classes=pool.classes,
            epsilon=epsilon,
        )
        run = subprocess.run([python, "-c", _SCRIPT, str(path)], check=True, capture_output=True, text=True, cwd="/")
    coverages, num_violations = [], 0
    for threshold in json.loads(run.stdout):
        is_kept = np.zeros(len(pool.agrees), bool) if threshold is None else pool.confidences >= threshold
        coverages.append(float(is_kept.mean()))
        num_violations += bool(is_kept.any()) and float((~pool.agrees[is_kept]).mean()) > epsilon
    return {"coverage": float(np.mean(coverages)), "violation_rate": num_violations / num_resamples}
