"""Checkpoints of quantized weights are refused with a remedy that transformers has for their method."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from linearize.errors import UnsupportedModelError
from linearize.models.config import refuse_quantized


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        (
            "mxfp4",
            r"quantization_config=Mxfp4Config\(dequantize=True\), save_pretrained",
        ),  # GPT-OSS as published
        ("fp8", r"quantization_config=FineGrainedFP8Config\(dequantize=True\), save_pretrained"),
        ("bitsandbytes", r"from_pretrained, model\.dequantize\(\), save_pretrained"),
        ("torchao", "unquantized checkpoint$"),
        ("of tomorrow", "unquantized checkpoint$"),
    ],
)
def test_the_remedy_is_one_that_the_method_has(method, remedy):
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"quantized \({method}\), .*{remedy}"):
        refuse_quantized(Path("model"), config)
