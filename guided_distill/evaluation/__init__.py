"""How good are the samples: distances and coverage between sets of features, and what feeds them."""
