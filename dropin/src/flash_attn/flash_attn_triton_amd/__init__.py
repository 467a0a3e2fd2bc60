"""The names under which the original keeps its AMD kernels; here the engine serves AMD without a switch."""
