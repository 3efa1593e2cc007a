"""Loading and saving of generators as on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from fastgan.models.fitting import difference
from fastgan.utils.files import open_regular, read_regular
from fastgan.utils.stored_values import NETWORKS, problem

_Mixin: Any = None
with contextlib.suppress(ModuleNotFoundError):
    from huggingface_hub import PyTorchModelHubMixin as _Mixin


_DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")
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
            """Load a generator, in evaluation mode; `strict`: every weight must be there, and none more.

            Args:
                args: a folder or the name of a repository.
                strict: False loads what is there into a generator as config.json describes it, whatever its size.
                options: of huggingface_hub, and arguments of the generator in place of those in config.json.

            Raises:
                ValueError: a value in config.json is wrong, or a weight does not fit; found before memory is allocated.
                OSError: a file is not there, or is not a regular file.
            """
            folder = Path(str(args[0])) if args else Path()
            if folder.is_dir() and os.path.lexists(folder / "config.json"):
                os.close(open_regular(folder / "config.json", os.O_RDONLY))  # the library would wait for a named pipe
            return super().from_pretrained(*args, strict=strict, **options)

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **options: Any
        ) -> Any:
            """As the library's, but shapes are compared before the network is built, and no pickle is read."""
            from huggingface_hub import hf_hub_download
            from safetensors.torch import load

            files = {name: options.pop(name, None) for name in _DOWNLOAD}
            local = Path(model_id, "model.safetensors")
            file = local if Path(model_id).is_dir() else hf_hub_download(model_id, "model.safetensors", **files)
            weights = load(read_regular(Path(file)))
            wrong = problem(options, NETWORKS) or (difference(lambda: cls(**options), weights) if strict else "")
            if wrong:
                raise ValueError(f"{model_id}: {wrong}")
            generator: Any = cls(**options)
            generator.load_state_dict(weights, strict=strict)
            return generator.to(map_location).eval()

        def save_pretrained(self, *args: Any, config: Any = None, **options: Any) -> Any:
            """Write config.json, which includes the name of the model, and model.safetensors into a folder."""
            values: Any = self._hub_mixin_config
            named = {"model": type(self).__module__.rpartition(".")[2], **values}
            return super().save_pretrained(*args, config=named if config is None else config, **options)
