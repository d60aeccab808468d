"""The PyTorch twin of the model, and the proofs that both agree."""
