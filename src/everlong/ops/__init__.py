"""Mathematics on tensors: a step-by-step reference first, then the fast form proved equal to it."""
