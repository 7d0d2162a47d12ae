"""Integrations with training frameworks, installed as `dualpipe_engine.integrations`."""
