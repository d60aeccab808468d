"""From logits to text: sampling rules, prefill and decoding."""
