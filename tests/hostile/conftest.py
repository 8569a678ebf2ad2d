"""The number of hostile inputs and their first seed; each input is one test, with its own seed.

    pytest tests/hostile --count 5000 --seed 1000000

An input's draws depend only on its test file and its seed, so --seed SEED --count 1 repeats it.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Case

FILES = 5
"""The number of test files that share the count."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        first = metafunc.config.getoption("--seed")
        count = max(1, metafunc.config.getoption("--count") // FILES)
        metafunc.parametrize("case", range(first, first + count), indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    file = request.path.name
    print(f"alone: pytest tests/hostile/{file} --seed {request.param} --count 1")
    with tempfile.TemporaryDirectory() as folder:
        # A relative path that the code forgot to check stays within this folder.
        monkeypatch.chdir(folder)
        yield Case(random.Random(f"{file}/{request.param}"), Path(folder))
