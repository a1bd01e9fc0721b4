"""The main job: pretraining from a config file to a run folder. Comes with the extra ``train``."""
