"""Device code only: no torch, no policy."""
