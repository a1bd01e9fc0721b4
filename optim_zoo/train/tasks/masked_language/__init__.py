"""Masked-language pretraining of BERT: its config section, text and batches."""
