import torch

from textmeta.heads.unlabelled import soft_labels


def test_confidence_is_from_none_to_full():
    logits = torch.tensor([[[0.0, 0.0, 0.0], [200.0, 0.0, 5.0]], [[1.0, 1.0, 50.0], [0.0, -200.0, 50.0]]]).double()
    classes = torch.tensor([[True, True, True], [True, True, False]])
    probabilities, confidence = soft_labels(logits.requires_grad_(), classes)
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(confidence, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert not probabilities[1, :, 2].any()
    assert torch.autograd.grad(confidence.sum(), logits)[0].isfinite().all()


def test_one_class_has_nothing_to_doubt():
    probabilities, confidence = soft_labels(
        torch.zeros(1, 2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    )
    assert probabilities.flatten().tolist() == [1.0, 1.0]
    assert confidence.flatten().tolist() == [1.0, 1.0]
