# SPDX-License-Identifier: Apache-2.0
"""Child process of a build: compiles with torch.utils.cpp_extension and loads the result once as proof.

A process of its own, so that the server's environment, CUDA state and registered ops stay as they were.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    """Ends this process group when stdin closes: the builder has died. ninja passes the signal on to the compilers."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGTERM)


def main(job: Path) -> None:
    """Runs the job that the builder wrote: keyword arguments of ``torch.utils.cpp_extension.load``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from torch.utils import cpp_extension

    cpp_extension.load(**json.loads(job.read_text()), is_python_module=False, verbose=True)
    # Tidying torch up would take a fifth of a second.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
