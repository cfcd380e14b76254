"""`python -m apt_hooks.launch SCRIPT ARGUMENTS`: a script of sd-scripts with APT, its files left as they are.

As the module of a launcher: `accelerate launch -m apt_hooks.launch sdxl_train_network.py --config_file train.toml`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .errors import errors_in_one_line


def main() -> None:
    """Run the script that is named first, with the arguments behind it."""
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    with errors_in_one_line():
        from .integrations.sd_scripts.launch import launch

        launch(Path(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    main()
