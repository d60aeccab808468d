"""How good a model is: scores on fixed tasks."""
