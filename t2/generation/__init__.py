"""Prompts in, completions out: encoding, batching, decoding, scoring and evaluation."""
