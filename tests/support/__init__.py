"""Helpers of the tests: checkpoints, parity with transformers, fake machines, learners' files."""
