"""The page on which one looks inside a model: what it shows, and how it stays quick."""
