"""The page of a run: one HTML file to look at, with its script inside. Nothing here imports torch."""
