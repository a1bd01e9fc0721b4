"""BERT as a task uses it: the model, its config section and WordPiece vocabularies."""
