"""The public gRPC API, package moefleet.v1, and its generated Python files."""
