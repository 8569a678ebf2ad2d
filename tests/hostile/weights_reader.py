"""Read weights files, each in its own process with little memory and time, and report the outcomes.

    python tests/hostile/weights_reader.py HONEST FILE...

Prints a JSON object that maps each file's path to [signal, outcome]. After each file, the same process
reads HONEST, a dictionary of a = [0, 1, 2, 3] in float32; the outcome ends with "then: " and HONEST's.
"""

import json
import os
import resource
import sys
from pathlib import Path

from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.torch_file import read_state_dict

MEMORY = 200 * 2**20
SECONDS = 20


def outcome(path):
    """Describe the result of reading a file."""
    try:
        return f"read { ({name: each.tolist() for name, each in read_state_dict(path).items()}) }"
    except UserError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"broken: {type(error).__name__}: {error}"


def within_limits(path, honest):
    """Read both files in a process; return the signal that ended it, or 0, and its outcomes."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(sender, f"{outcome(path)} then: {outcome(honest)}".encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as said:
        words = said.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words


def main(honest, *paths):
    """Print the outcomes of all files."""
    print(json.dumps({path: within_limits(epath.Path(path), epath.Path(honest)) for path in paths}))


if __name__ == "__main__":
    main(*sys.argv[1:])
