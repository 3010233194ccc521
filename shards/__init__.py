"""What one rank holds and computes: torch only, never ray, grpc or http."""
