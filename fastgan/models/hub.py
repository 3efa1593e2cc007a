"""What makes a generator one of the Hugging Face hub's: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

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
    raise ModuleNotFoundError("pip install 'fastgan[export]' brings huggingface_hub", name="huggingface_hub")


if _Mixin is None:

    class Pretrained:
        """Stands in where huggingface_hub is not installed: the networks work, their part of the hub says so."""

        from_pretrained = classmethod(_missing)
        save_pretrained = push_to_hub = _missing

else:

    class Pretrained(_Mixin, **_CARD):  # type: ignore[no-redef]
        """A generator that a folder or a repository of the hub holds as model.safetensors and config.json.

        `fastgan export` writes such a folder, `fastgan.load` reads one.
        """

        @classmethod
        def from_pretrained(cls, *args: Any, strict: bool = True, **options: Any) -> Any:
            """The generator of a folder or a repository, in evaluation mode; `strict`: every weight must be there."""
            return super().from_pretrained(*args, strict=strict, **options)

        def save_pretrained(self, *args: Any, config: Any = None, **options: Any) -> Any:
            """Write config.json, with the name of the model, and model.safetensors into a folder."""
            values: Any = self._hub_mixin_config
            named = {"model": type(self).__module__.rpartition(".")[2], **values}
            return super().save_pretrained(*args, config=named if config is None else config, **options)
