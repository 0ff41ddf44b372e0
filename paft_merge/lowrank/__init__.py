"""Low-rank approximations of deltas: of products of factors, and of dense matrices that are streamed."""
