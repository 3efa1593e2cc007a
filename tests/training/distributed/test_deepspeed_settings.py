"""What DeepSpeed is told, and networks that it would refuse as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file

from fastgan.training.distributed import private_api
from fastgan.training.distributed.deepspeed_engine import deepspeed_config, without_grad_norm

SIZES = {"micro_batch": 4, "accumulation": 1, "world": 1}


def zero_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = without_grad_norm(config)["zero_optimization"]
    return found


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_no_norm_of_gradients_under_zero(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepspeed_config(None, zero=zero, **SIZES)
    monkeypatch.setattr(private_api, "knows_compute_grad_norm", lambda: True)
    assert zero_of(config).get("compute_grad_norm", True) is (zero == 0)
    monkeypatch.setattr(private_api, "knows_compute_grad_norm", lambda: False)
    assert without_grad_norm(config) is config  # an older DeepSpeed refuses the key


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_clipping": 1.0},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"compute_grad_norm": True}},
    ],
)
def test_a_file_that_needs_the_norm_keeps_it(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_api, "knows_compute_grad_norm", lambda: True)
    config = deepspeed_config(None, zero=1, **SIZES)
    zero = {**config["zero_optimization"], **given.get("zero_optimization", {})}
    assert zero_of({**config, **given, "zero_optimization": zero}).get("compute_grad_norm", True)


@pytest.mark.slow
def test_networks_with_a_parameter_without_dimensions_train(tmp_path: Path) -> None:
    """SAGAN's gamma, which DeepSpeed 0.19.8 cannot broadcast as it is; the same weights under each ZeRO stage."""
    small = "--width 8 --max-width 16 --resolution 16 --attention-at 8 --latent 8 --batch 8 --memory-format contiguous"
    cases = [
        {"name": f"zero-{zero}", "variant": "sagan", "flags": [*small.split(), "--zero", str(zero)], "steps": 4}
        for zero in (0, 1, 2)
    ]
    ranks.launch(Path(ranks.__file__), cases, tmp_path, 2, engine="deepspeed")
    found = [load_file(tmp_path / f"{case['name']}.safetensors") for case in cases]
    gammas = [name for name in found[0] if name.startswith("g.") and name.endswith("gamma")]
    assert gammas and all(weights[name].dim() == 0 and weights[name] != 0 for weights in found for name in gammas)
    for other in found[1:]:
        for name in gammas:  # biases before a batch norm have no gradient but rounding, which Adam makes large
            torch.testing.assert_close(other[name], found[0][name], rtol=1e-2, atol=1e-5, msg=name)
