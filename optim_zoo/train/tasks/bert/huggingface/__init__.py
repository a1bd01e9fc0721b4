"""BERT in the formats of other programs: Hugging Face's folders, and TensorFlow's variables."""
