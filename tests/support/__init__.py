"""What several test modules use: checkpoints, comparisons with transformers, fake machines,
learners' files.
"""
