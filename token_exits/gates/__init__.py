"""When is a token sure enough to leave? One contract, one file a kind of gate."""
