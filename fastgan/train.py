"""For launchers: `deepspeed fastgan/train.py --variant pggan` is `fastgan train` (fastgan/cli/train.py)."""

import os
import sys

if __name__ == "__main__":
    # Run as a script, Python puts this folder first on the path, where its files would hide other top-level modules.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if os.path.abspath(path or ".") != here)]

    import fastgan

    fastgan.configure_process()  # before the command imports torch
    from fastgan.cli.train import main

    sys.exit(main(sys.argv[1:]))
