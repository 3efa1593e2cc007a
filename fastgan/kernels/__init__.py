"""Makes the folder kernels/ beside fastgan/ the package `fastgan.kernels` in a checkout.

An installed wheel has the content of that folder in place of this file. In a checkout this file lets Python find
`fastgan.kernels.NAME` without an installation: on PYTHONPATH, through torch.hub and for scripts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]

if TYPE_CHECKING:  # mypy checks kernels/ as a package of that name, and does not follow __path__

    def __getattr__(name: str) -> Any: ...
