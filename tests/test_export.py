"""A classifier as ONNX: what it answers, with textmeta and without, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from tests.encoder.given import FAMILIES, save_family
from tests.test_classifier import LABELS, SUPPORT, TEXTS, adapter_of
from textmeta import FewShotClassifier


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    clf = FewShotClassifier(adapter_of(save_family(tmp_path / "model", family))).fit(SUPPORT, LABELS)
    clf.export_onnx(tmp_path / "onnx")
    found = FewShotClassifier.from_pretrained(tmp_path / "onnx", backend="onnx")
    np.testing.assert_allclose(found.predict_proba(TEXTS), clf.predict_proba(TEXTS), atol=1e-5)
