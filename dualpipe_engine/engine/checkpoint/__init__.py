"""Checkpoints: saving, loading, the files on disk, and the export of their weights."""
