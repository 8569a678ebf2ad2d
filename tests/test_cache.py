"""The flag --cache: programs that JAX compiled for one command are reused by the next."""

import os
import subprocess
import sys

import jax
from etils import epath

from guided_distill.verbs.shared import keep_compiled_programs

FOLDER = "JAX_COMPILATION_CACHE_DIR"
COMPILE = """
import sys
import jax
from etils import epath
from guided_distill.verbs.shared import keep_compiled_programs

keep_compiled_programs(epath.Path(sys.argv[1]))
jax.jit(lambda x: x + 1)(1.0)
"""


def test_compiled_programs_are_kept_in_it(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != FOLDER}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    subprocess.run(command, env=environment, check=True)
    assert any((tmp_path / "compiled").iterdir())


def test_the_folder_that_jax_is_configured_with_takes_precedence(tmp_path):
    keep_compiled_programs(epath.Path(tmp_path))
    assert jax.config.jax_compilation_cache_dir == os.environ[FOLDER]
