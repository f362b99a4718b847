"""Every op in plain PyTorch: the readable definition, and the oracle of the tests."""
