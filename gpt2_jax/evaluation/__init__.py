"""How good a model is: how likely it finds texts, and scores on fixed tasks."""
