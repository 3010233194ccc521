"""Trains the demo models that `moefleet demo` serves; not shipped."""
