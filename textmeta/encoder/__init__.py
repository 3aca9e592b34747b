"""The layered encoder: the hidden states of several layers of a transformer, as the classifier reads them."""
