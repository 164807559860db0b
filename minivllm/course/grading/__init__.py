"""How an answer is judged, and how its result is kept and shown."""
