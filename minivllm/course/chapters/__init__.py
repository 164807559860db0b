"""The exercises: a folder per chapter, a module per exercise."""
