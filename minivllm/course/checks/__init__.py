"""What checks the exercises: chNN.py holds a chapter's checks, chNN.json the digests of its
solution's given cells.
"""
