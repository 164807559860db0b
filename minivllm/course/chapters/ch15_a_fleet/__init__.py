"""The exercises of chapter 15: a fleet."""
