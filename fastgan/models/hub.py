"""Loading and saving of generators as on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from typing import Any

_Mixin: Any = None
with contextlib.suppress(ModuleNotFoundError):
    from huggingface_hub import PyTorchModelHubMixin as _Mixin


_CARD: Any = {
    "library_name": "fastgan",
    "tags": ["gan", "image-generation"],
    "pipeline_tag": "unconditional-image-generation",
}


def _missing(*_: Any, **__: Any) -> Any:
    raise ModuleNotFoundError("huggingface_hub is not installed: pip install 'fastgan[export]'", name="huggingface_hub")


if _Mixin is None:

    class Pretrained:
        """Without huggingface_hub the networks work, and the three methods raise an error that names the package."""

        from_pretrained = classmethod(_missing)
        save_pretrained = push_to_hub = _missing

else:

    class Pretrained(_Mixin, **_CARD):  # type: ignore[no-redef]
        """A generator that can be stored as model.safetensors and config.json, in a folder or a hub repository.

        `fastgan export` writes such a folder and `fastgan.load` reads one.
        """

        @classmethod
        def from_pretrained(cls, *args: Any, strict: bool = True, **options: Any) -> Any:
            """Load a generator, in evaluation mode; `strict`: every weight must be there."""
            return super().from_pretrained(*args, strict=strict, **options)

        def save_pretrained(self, *args: Any, config: Any = None, **options: Any) -> Any:
            """Write config.json, which includes the name of the model, and model.safetensors into a folder."""
            values: Any = self._hub_mixin_config
            named = {"model": type(self).__module__.rpartition(".")[2], **values}
            return super().save_pretrained(*args, config=named if config is None else config, **options)
