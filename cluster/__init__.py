"""Sequences, blocks, scheduler, engine, hand-off, Ray actors, pools and failure handling."""
