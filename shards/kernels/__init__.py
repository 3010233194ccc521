"""Operators a model is built of: a plain torch set and a native CPU set behind one interface."""
