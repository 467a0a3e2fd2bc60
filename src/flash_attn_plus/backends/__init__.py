"""The engines behind a call, each told what it cannot do in `reasons`."""
