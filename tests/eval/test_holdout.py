"""The held-out loss is the one that the model was trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_ray.contrastive import reference_loss, reference_siglip_loss
from clip_ray.eval.holdout import evaluate_holdout, read_pairs
from clip_ray.inference import Encoder
from clip_ray.model import build
from clip_ray.registry import ExportInfo
from tests.train.test_loop import make_run


@pytest.mark.parametrize("bias", [None, -3.0])
def test_the_loss_is_the_models_own(tmp_path: Path, bias: float | None) -> None:
    run = make_run(tmp_path, data={"holdout": 0.3})
    model = build(run.config.model.model_copy(update={"init_logit_bias": bias}), seed=0)
    encoder = Encoder(model, run.tokenizer, ExportInfo(digest=None, run_id=None, extra={}))
    pairs = read_pairs(run.manifest, run.config.data, 1000)
    assert len(pairs) > 10
    features = (
        torch.from_numpy(encoder.encode_images([p.image for p in pairs])),
        torch.from_numpy(encoder.encode_texts([p.caption for p in pairs])),
    )
    scale = torch.tensor(1 / 0.07)
    softmax = reference_loss(*features, scale).item()
    sigmoid = reference_siglip_loss(*features, scale, torch.tensor(-3.0)).item()
    found = evaluate_holdout(encoder, run.manifest, run.config.data).metrics["loss"]
    assert found == pytest.approx(softmax if bias is None else sigmoid, rel=1e-4)
    assert abs(softmax - sigmoid) > 0.1
