"""The dealer: a third party that makes the correlated randomness of ``semi2k`` and never sees a secret."""
