"""SAGAN under a gradient penalty: attention differentiated twice in a network that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan import data
from fastgan.cli.train import parse
from fastgan.evaluation.sliced_wasserstein import sliced_wasserstein
from fastgan.generator import sample_images
from fastgan.ops import attention_chunked, use_backend
from fastgan.training.distributed import process_group as processes
from fastgan.training.trainer import Trainer

FLAGS = "--variant sagan --loss wasserstein --regularizer gradient-penalty --resolution 8 --latent 16 --batch 32"
SIZE = "--width 8 --max-width 16 --kimg 4 --lr-g 1e-3 --lr-d 1e-3"


@pytest.mark.slow
def test_distance_to_the_data_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = attention_chunked.attention_second_backward

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args)

    monkeypatch.setattr(attention_chunked, "attention_second_backward", counted)
    request = parse([*FLAGS.split(), *SIZE.split()])
    source = data.open_source("digits", 8)
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    trainer = Trainer(request.config, "sagan", world, source, tmp_path)
    real = data.open(source, resolution=8, seed=1).batch(0, 512).images

    def distance() -> float:
        return sliced_wasserstein(sample_images(trainer.stage.ema.module, 512, 0, trainer.stage.networks), real)

    before, steps = distance(), 0
    with use_backend(scaled_dot_product_attention="chunked"):
        while trainer.images < trainer.total:
            trainer.train_step()
            steps += 1
    assert calls >= steps > 100  # every step of the critic went through it
    assert distance() < before / 2
