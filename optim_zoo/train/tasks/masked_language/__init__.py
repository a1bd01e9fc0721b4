"""Masked-language pretraining of BERT: its config sections, text, batches and model."""
