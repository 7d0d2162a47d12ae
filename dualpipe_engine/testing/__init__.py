"""Helpers that tests and benches share and that training does not use."""
